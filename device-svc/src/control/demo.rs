//! The demo: the card in this process on an embedded default, real virtio traffic through its socket, and how to go on.
//!
//! What is driven is what is served: the same reactors, link, queues and file backend, reached over a vhost-user socket by a
//! driver that knows nothing else of the card.

mod show;
mod stand;
mod traffic;

use std::io::Write;

use crate::config::quantity::parse_size;
use stand::Stand;

/// What the demo may be told.
#[derive(clap::Args, Clone, Debug)]
pub struct DemoArguments {
    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

/// The volume's size.
const VOLUME_SIZE: &str = "64M";

/// Runs the demo.
///
/// # Errors
/// When the card cannot run here, or reads back what was not written.
pub fn run(arguments: DemoArguments) -> anyhow::Result<()> {
    let volume_bytes = parse_size(VOLUME_SIZE).map_err(anyhow::Error::msg)?;
    let stand = Stand::start(VOLUME_SIZE)?;
    let socket = stand.socket().to_owned();
    let text = if arguments.json { String::new() } else { show::beginning(&stand) };
    print(&text)?;
    // A thread of its own, so that pinning it pins nothing else.
    let driver = std::thread::Builder::new().name("driver".to_owned());
    let driven = driver.spawn(move || traffic::drive(&socket, volume_bytes))?.join();
    let figures = driven.map_err(|_| anyhow::anyhow!("the driver panicked"))??;
    stand.stop();
    print(&if arguments.json { show::json(&figures) } else { show::end(&figures) })
}

fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        // A reader that has seen enough is no error.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
