//! The commands. Each ends with one clear line and status 1 when it fails, and then has left nothing half done.

pub(crate) mod arguments;
mod client;
mod function;
mod output;
mod serve;
mod signals;
mod stats;
mod update;
mod uplink;
mod validate;
mod volume;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory;

use arguments::{Arguments, Command, LogFormat};
use output::print;

/// Runs one command.
pub(crate) fn run(arguments: Arguments) -> Result<ExitCode> {
    let done = match arguments.command {
        Command::Serve(serve) => {
            set_up_logs(serve.log_format);
            return serve::serve(&serve);
        }
        Command::Update(update) => update::run(&update),
        Command::Validate(validate) => validate::run(&validate),
        Command::Function(command) => function::run(command),
        Command::Volume(command) => volume::run(command),
        Command::Uplink(command) => uplink::run(command),
        Command::Stats(stats) => stats::run(&stats),
        Command::Demo(demo) => device_svc::control::demo::run(demo),
        Command::Completion { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "device-svc", &mut text);
            print(&String::from_utf8_lossy(&text))
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

fn set_up_logs(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // Standard output is for what was asked for; logs go beside it.
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => logs.json().init(),
    }
}
