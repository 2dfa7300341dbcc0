//! The demo: the card on an embedded default, under real virtio traffic.

/// What the demo may be told.
#[derive(clap::Args, Debug)]
pub struct DemoArguments {}

/// Runs the demo.
///
/// # Errors
/// When it cannot be run.
pub fn run(_arguments: DemoArguments) -> anyhow::Result<()> {
    anyhow::bail!("the demo is not there yet")
}
