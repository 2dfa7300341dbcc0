//! `device-svc serve`: the card's process, from its signals to its last breath.

use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use device_svc::config::Config;
use device_svc::control::open_backend::{open_backend, open_uplink};
use device_svc::control::serve::{Card, Update};
use device_svc::control::starter::start_reactors;
use device_svc::keeper;
use device_svc::tether::Tether;
use nix::sys::signal::{SigSet, Signal};
use tokio::sync::watch;

use super::arguments::Serve;
use super::client::parse_address;
use super::output::print;

/// Serves until told to stop, as the keeper of the process that does.
pub(crate) fn serve(serve: &Serve) -> Result<ExitCode> {
    if serve.kept || serve.no_keeper {
        return serve_card(serve).map(|()| ExitCode::SUCCESS);
    }
    let ended = keeper::run(|| notify_systemd("READY=1"));
    notify_systemd("STOPPING=1");
    Ok(ended?)
}

/// The service's end of what leads to its keeper, which started it with that as standard input.
fn tether() -> Result<Arc<Tether>> {
    // Without a keeper there is nobody who would start another; ended by this, the service ends in good order.
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).context("follow the keeper")?;
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context("reach the keeper")?;
    Ok(Arc::new(Tether::new(socket)))
}

/// Serves until told to stop.
fn serve_card(serve: &Serve) -> Result<()> {
    // Before any thread is spawned, so that every one of them is born with these blocked: they end the card between turns,
    // and only the thread below takes them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("block signals")?;
    let (stop, stopping) = watch::channel(false);
    let stop = Arc::new(stop);
    let to_stop = Arc::clone(&stop);
    let taker = std::thread::Builder::new().name("signals".to_owned());
    taker.spawn(move || take_signals(&signals, &to_stop)).context("start the thread that takes signals")?;

    let mut config = match &serve.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    if serve.control.is_some() {
        config.control.listen = parse_address(serve.control.as_deref())?;
        config.control.shim = config.control.listen.shim_beside();
    }
    let tether = serve.kept.then(tether).transpose()?;
    if let Some(tether) = tether.as_ref().filter(|_| serve.stand_by) {
        tether.stand_by()?;
    }
    device_svc::dma::install_bus_fault_guard().context("install the guard against truncated VM memory")?;

    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the control thread")?;
    let served: Result<()> = runtime.block_on(async {
        let starter = start_reactors(&config.reactors, tether.clone())?;
        let mut card = Card::bind(&config, starter, Box::new(open_backend), Box::new(open_uplink))?;
        if let Some(tether) = &tether {
            card.can_be_updated(Update { tether: Arc::clone(tether), stop: stop.clone() });
        }
        let ready = ready_line(&config, &card);
        card.serve(config, stopping, || {
            tracing::info!("{ready}");
            // Whoever started us may have closed its end; the card serves all the same.
            let _ = print(&format!("ready: {ready}\n"));
            match &tether {
                None => notify_systemd("READY=1"),
                // It has gone only if we are about to be told to stop.
                Some(tether) => drop(tether.ready()),
            }
        })
        .await?;
        Ok(())
    });
    if tether.is_none() {
        notify_systemd("STOPPING=1");
    }
    // Threads that wait for a storage server do not keep the process.
    runtime.shutdown_background();
    served
}

fn ready_line(config: &Config, card: &Card) -> String {
    let metrics =
        card.metrics_address().map(|address| format!(", metrics http://{address}/metrics")).unwrap_or_default();
    let (volumes, uplinks, functions) = (config.volumes.len(), config.uplinks.len(), config.functions.len());
    let control = &config.control.listen;
    format!("control {control}, volumes {volumes}, uplinks {uplinks}, functions {functions}{metrics}")
}

/// The first signal stops the card, a second one ends the process at once. Waits for as long as the process lives.
fn take_signals(signals: &SigSet, stop: &watch::Sender<bool>) {
    loop {
        match signals.wait() {
            Ok(signal) if *stop.borrow() => {
                tracing::warn!("{signal} again: ending at once");
                // As a shell reports a process that a signal ended.
                std::process::exit(128 + signal as i32);
            }
            Ok(signal) => {
                tracing::info!("{signal}: stopping when what is in flight has completed");
                stop.send_replace(true);
            }
            Err(error) => {
                tracing::error!(%error, "signals cannot be taken");
                return;
            }
        }
    }
}

/// Tells a service manager that asked for it (`sd_notify(3)`): one datagram to the socket that it named.
fn notify_systemd(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name),
        None => SocketAddr::from_pathname(&name),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager was not told {state}");
    }
}
