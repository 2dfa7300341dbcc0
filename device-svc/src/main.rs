//! The command line: serves a card, or asks one that runs.

mod command;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // Usage errors end here with status 2, as clap has it.
    let arguments = command::arguments::Arguments::parse();
    match command::run(arguments) {
        Ok(code) => code,
        Err(error) => {
            // One line, with the causes that say more.
            eprintln!("device-svc: {error:#}");
            ExitCode::from(1)
        }
    }
}
