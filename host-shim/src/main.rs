//! The one program on the host: it tells which functions the card has, and what happens to them.

mod arguments;
mod follow;
mod output;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{CommandFactory, Parser};
use proto::v1::ListFunctionViewsRequest;
use proto::v1::host_view_client::HostViewClient;

use arguments::{Arguments, Command};

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("host-shim: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    match arguments.command {
        Command::List(ask) => runtime.block_on(async {
            let mut card = connect(&ask.socket()?).await?;
            let reply = card.list_function_views(ListFunctionViewsRequest {}).await;
            let functions = reply.map_err(|status| anyhow!("{}", status.message()))?.into_inner().functions;
            output::print(&output::list(&functions, ask.json))
        }),
        Command::Follow(ask) => runtime.block_on(follow::follow(&ask.socket()?, ask.json)),
        Command::Completion { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "host-shim", &mut text);
            output::print(&String::from_utf8_lossy(&text))
        }
    }
}

/// host-shim's service at a socket.
type Card = HostViewClient<tonic::transport::Channel>;

/// How long a card may take to answer at all.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);

async fn connect(socket: &str) -> Result<Card> {
    use std::io::ErrorKind;
    // Asked first, because its error says what is wrong in a word.
    std::os::unix::net::UnixStream::connect(socket).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            anyhow!("no card at unix:{socket}; start device-svc, or give its address with --card")
        }
        ErrorKind::PermissionDenied => anyhow!("unix:{socket} may not be opened; become its owner or join its group"),
        _ => anyhow!("cannot reach the card at unix:{socket}: {error}"),
    })?;
    let connected = tokio::time::timeout(CONNECT_TIME_MAX, proto::connect(socket)).await;
    let channel = connected.map_err(|_| anyhow!("the card at unix:{socket} does not answer"))?;
    Ok(HostViewClient::new(channel.with_context(|| format!("cannot reach the card at unix:{socket}"))?))
}
