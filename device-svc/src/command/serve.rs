//! `device-svc serve`: the card's process, from its signals to its last breath.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use device_svc::config::{Config, ControlAddress};
use device_svc::control::inventory::Inventory;
use device_svc::control::open_backend::{open_backend, open_uplink};
use device_svc::control::serve::{Card, Update};
use device_svc::control::starter::start_reactors;
use device_svc::keeper;
use device_svc::state::{StateFolder, default_state_folder};
use device_svc::tether::{LANGUAGE, Tether};
use nix::sys::signal::Signal;
use tokio::sync::watch;

use super::arguments::Serve;
use super::client::parse_address;
use super::output::print;
use super::signals::{self, Signals};

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
fn tether(strict: bool) -> Result<Arc<Tether>> {
    // Without a keeper there is nobody who would start another; ended by this, the service ends in good order.
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).context("follow the keeper")?;
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context("reach the keeper")?;
    // A thread that panics leaves queues behind that nobody turns: another process has them in a moment.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    // One of an earlier version says nothing.
    let language = std::env::var(LANGUAGE).ok().and_then(|language| language.parse().ok()).unwrap_or_default();
    Ok(Arc::new(Tether::new(socket, strict, language)))
}

/// Serves until told to stop.
fn serve_card(serve: &Serve) -> Result<()> {
    // Before any thread is started, so that every one of them is born with them blocked.
    signals::block()?;
    let (stop, stopping) = watch::channel(false);
    let stop = Arc::new(stop);

    let mut config = match &serve.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    if serve.control.is_some() {
        config.control.listen = parse_address(serve.control.as_deref())?;
        config.control.shim = config.control.listen.shim_beside();
    }
    let tether = serve.kept.then(|| tether(serve.stand_by)).transpose()?;
    if let Some(tether) = tether.as_ref().filter(|_| serve.stand_by) {
        tether.stand_by()?;
    }
    device_svc::dma::install_bus_fault_guard().context("install the guard against truncated VM memory")?;

    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the control thread")?;
    // Before a reactor turns: whoever uses the folder is found first.
    let state = state_folder(serve, &config)?.map(|folder| StateFolder::open(&folder)).transpose()?;
    let served: Result<()> = runtime.block_on(async {
        tokio::spawn(Signals::new()?.act(Arc::clone(&stop)));
        let starter = start_reactors(&config.reactors, tether.clone())?;
        let mut card = Card::bind(&config, starter, Box::new(open_backend), Box::new(open_uplink))?;
        if let Some(tether) = &tether {
            card.can_be_updated(Update { tether: Arc::clone(tether), stop: Arc::clone(&stop) });
        }
        if let Some((folder, before)) = state {
            card.inventory().keep_in(folder, before);
        }
        let (metrics, inventory) = (card.metrics_address(), Arc::clone(card.inventory()));
        let control = config.control.listen.clone();
        let mut refused = None;
        card.serve(config, stopping, || {
            if let Some(tether) = &tether
                && let Err(error) = tether.ready(inventory.failed_functions().into_iter())
            {
                refused = Some(error);
                stop.send_replace(true);
                return;
            }
            let ready = ready_line(&control, metrics, &inventory);
            tracing::info!("{ready}");
            // Whoever started us may have closed its end; the card serves all the same.
            let _ = print(&format!("ready: {ready}\n"));
            if tether.is_none() {
                notify_systemd("READY=1");
            }
        })
        .await?;
        refused.map_or(Ok(()), |error| Err(error).context("the card cannot be taken over"))
    });
    if tether.is_none() {
        notify_systemd("STOPPING=1");
    }
    // Threads that wait for a storage server do not keep the process.
    runtime.shutdown_background();
    served
}

/// What is there now, with what is remembered.
fn ready_line(control: &ControlAddress, metrics: Option<SocketAddr>, inventory: &Inventory) -> String {
    let metrics = metrics.map(|address| format!(", metrics http://{address}/metrics")).unwrap_or_default();
    let (volumes, uplinks) = (inventory.volumes().len(), inventory.uplinks().len());
    let functions = inventory.functions().len();
    let failed = if inventory.has_failed() { ", some failed" } else { "" };
    format!("control {control}, volumes {volumes}, uplinks {uplinks}, functions {functions}{failed}{metrics}")
}

/// Where the card remembers what it has, if it does.
fn state_folder(serve: &Serve, config: &Config) -> Result<Option<PathBuf>> {
    if serve.no_state {
        return Ok(None);
    }
    let folder = match (&serve.state, &config.control.state) {
        (Some(given), _) => std::path::absolute(given).context("the current folder is not there; change to another")?,
        (None, Some(configured)) => configured.clone(),
        (None, None) => default_state_folder()?,
    };
    Ok(Some(folder))
}

/// Tells a service manager that asked for it (`sd_notify(3)`): one datagram to the socket that it named.
fn notify_systemd(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(abstract_name) => UnixAddress::from_abstract_name(abstract_name),
        None => UnixAddress::from_pathname(&name),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager was not told {state}");
    }
}
