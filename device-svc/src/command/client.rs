//! A connection to a running card.

use std::future::Future;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use device_svc::config::{ControlAddress, default_control_address};
use proto::v1::card_client::CardClient;
use tonic::transport::Channel;

/// A card's operator service.
pub(crate) type Card = CardClient<Channel>;

/// Connects to the card at `address`, or the default one, and runs `work` with it.
pub(crate) fn with_card<T, F: Future<Output = Result<T>>>(
    address: Option<&str>,
    work: impl FnOnce(Card) -> F,
) -> Result<T> {
    let address = parse_address(address)?;
    // Asked first, because its error says what is wrong in a word.
    UnixStream::connect(address.socket()).map_err(|error| unreachable_card(&address, &error))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    runtime.block_on(async {
        let socket = address.socket().display().to_string();
        let channel = proto::connect(&socket).await.with_context(|| format!("cannot reach the card at {address}"))?;
        work(CardClient::new(channel).max_decoding_message_size(256 << 20)).await
    })
}

/// The address given, or the default.
pub(crate) fn parse_address(address: Option<&str>) -> Result<ControlAddress> {
    match address {
        None => Ok(default_control_address()),
        Some(text) => {
            ControlAddress::parse(text, &current_folder()?).map_err(|message| anyhow!("--control: {message}"))
        }
    }
}

/// Where relative paths of this command start from.
pub(crate) fn current_folder() -> Result<PathBuf> {
    std::env::current_dir().context("the current folder is not there; change to another")
}

fn unreachable_card(address: &ControlAddress, error: &std::io::Error) -> anyhow::Error {
    use std::io::ErrorKind;
    let next = match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            "no card runs there; start one with `device-svc serve`, or give its address with --control"
        }
        ErrorKind::PermissionDenied => "only the card's user may open it; become that user",
        _ => return anyhow!("cannot reach the card at {address}: {error}"),
    };
    anyhow!("cannot reach the card at {address}: {next}")
}

/// The line that the card sent.
pub(crate) fn refused(status: tonic::Status) -> anyhow::Error {
    match status.code() {
        tonic::Code::Unknown | tonic::Code::Internal => anyhow!("the card failed: {}", status.message()),
        _ => anyhow!("{}", status.message()),
    }
}
