//! The control thread: listens on the card's sockets until it is told to stop, then ends everything in bounded time.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use proto::v1::card_server::CardServer;
use proto::v1::host_view_server::HostViewServer;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::inventory::{Inventory, InventoryError, OpenBackend, OpenUplink};
use super::metrics_http::serve_metrics;
use super::seam::FunctionStarter;
use super::service::{CardService, HostViewService};
use super::socket::{ListeningSocket, SocketError};
use crate::config::Config;
use crate::tether::Tether;

/// Only the card's own user; the sockets themselves are the access control.
const CARD_SOCKET_MODE: u32 = 0o600;

/// host-shim may run as another user of the card's group.
const SHIM_SOCKET_MODE: u32 = 0o660;

/// How long clients may take to see their streams end.
const FAREWELL_TIME_MAX: Duration = Duration::from_secs(2);

/// How long functions may take to stop, by their contract well below this.
const STOP_TIME_MAX: Duration = Duration::from_secs(20);

/// How often what has failed is tried again.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Messages are settings and lists; 4096 functions with their statistics fit.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Why the card does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A control socket.
    #[error("control: {0}")]
    Socket(#[from] SocketError),
    /// The metrics address.
    #[error("control: `metrics`: {address}: {source}; choose another address or leave it out")]
    Metrics {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// A volume, uplink or function of the configuration.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The machine refuses what any service needs.
    #[error("{0}")]
    System(#[from] std::io::Error),
    /// Functions did not stop in time; the process must end without them.
    #[error("functions did not stop within 20 s")]
    StopTime,
}

/// How another program takes over.
pub struct Update {
    /// To the keeper.
    pub tether: Arc<Tether>,
    /// Stops the card.
    pub stop: Arc<watch::Sender<bool>>,
}

/// A card whose sockets are bound.
pub struct Card {
    inventory: Arc<Inventory>,
    listen: ListeningSocket,
    shim: ListeningSocket,
    metrics: Option<TcpListener>,
    update: Option<Update>,
}

impl Card {
    /// Binds the sockets of `config`, so that an address in use is found before anything is started.
    ///
    /// # Errors
    /// When an address cannot be had.
    pub fn bind(
        config: &Config,
        starter: Arc<dyn FunctionStarter>,
        open_backend: OpenBackend,
        open_uplink: OpenUplink,
    ) -> Result<Self, ServeError> {
        let listen = ListeningSocket::bind(config.control.listen.socket(), CARD_SOCKET_MODE)?;
        let shim = ListeningSocket::bind(config.control.shim.socket(), SHIM_SOCKET_MODE)?;
        let bind = |address: SocketAddr| {
            let listener = TcpListener::bind(address).and_then(|listener| {
                listener.set_nonblocking(true)?;
                Ok(listener)
            });
            listener.map_err(|source| ServeError::Metrics { address, source })
        };
        let metrics = config.control.metrics.map(bind).transpose()?;
        Ok(Self {
            inventory: Arc::new(Inventory::new(starter, open_backend, open_uplink)),
            listen,
            shim,
            metrics,
            update: None,
        })
    }

    /// Another program can take over.
    pub fn can_be_updated(&mut self, update: Update) {
        self.update = Some(update);
    }

    /// What the card has.
    #[must_use]
    pub const fn inventory(&self) -> &Arc<Inventory> {
        &self.inventory
    }

    /// Where metrics are served, with the port that port 0 became.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Starts the configuration's volumes, uplinks and functions, calls `ready`, and serves until `stop` holds true; then stops all
    /// of it. Runs within a tokio runtime.
    ///
    /// # Errors
    /// When something of the configuration cannot be started (all is stopped again), or does not stop in time.
    pub async fn serve(
        mut self,
        config: Config,
        stop: watch::Receiver<bool>,
        ready: impl FnOnce(),
    ) -> Result<(), ServeError> {
        let tether = self.update.as_ref().map(|update| Arc::clone(&update.tether));
        let inventory = Arc::clone(&self.inventory);
        let started = tokio::task::spawn_blocking(move || inventory.start_all(&config)).await;
        started.map_err(std::io::Error::other)??;

        let card = CardServer::new(CardService::new(Arc::clone(&self.inventory), self.update.take()));
        let card = Server::builder().add_service(card.max_decoding_message_size(MESSAGE_BYTES_MAX));
        let shim = HostViewServer::new(HostViewService::new(Arc::clone(&self.inventory)));
        let shim = Server::builder().add_service(shim.max_decoding_message_size(MESSAGE_BYTES_MAX));
        let card = card.serve_with_incoming_shutdown(incoming(&mut self.listen)?, stopped(stop.clone()));
        let shim = shim.serve_with_incoming_shutdown(incoming(&mut self.shim)?, stopped(stop.clone()));
        let (card, shim) = (tokio::spawn(card), tokio::spawn(shim));
        let metrics = match self.metrics.take() {
            None => None,
            Some(listener) => {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                Some(tokio::spawn(serve_metrics(listener, Arc::clone(&self.inventory))))
            }
        };
        let trying = tokio::spawn(try_failed_again(Arc::clone(&self.inventory)));
        ready();
        stopped(stop.clone()).await;
        trying.abort();

        // Functions first, while followers still see them go.
        let inventory = Arc::clone(&self.inventory);
        let stopping = tokio::task::spawn_blocking(move || {
            inventory.stop_all(tether.is_some_and(|tether| tether.is_for_another()))
        });
        let stopped_in_time = tokio::time::timeout(STOP_TIME_MAX, stopping).await;
        self.inventory.events().close();
        if let Some(metrics) = metrics {
            metrics.abort();
        }
        let farewell = async { (card.await, shim.await) };
        // A client that keeps its connection open does not keep the card.
        let _ = tokio::time::timeout(FAREWELL_TIME_MAX, farewell).await;
        match stopped_in_time {
            Ok(stopped) => Ok(stopped.map_err(std::io::Error::other)?),
            Err(_) => Err(ServeError::StopTime),
        }
    }
}

fn incoming(socket: &mut ListeningSocket) -> Result<UnixListenerStream, ServeError> {
    let listener = socket.take().ok_or_else(|| std::io::Error::other("the socket is served already"))?;
    Ok(UnixListenerStream::new(UnixListener::from_std(listener)?))
}

async fn try_failed_again(inventory: Arc<Inventory>) {
    loop {
        tokio::time::sleep(AGAIN_AFTER).await;
        if inventory.has_failed() {
            let inventory = Arc::clone(&inventory);
            // It errs when the runtime ends.
            let _ = tokio::task::spawn_blocking(move || inventory.try_failed_again()).await;
        }
    }
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // Errs when nobody can say stop any more, which is an end too.
    let _ = stop.wait_for(|stop| *stop).await;
}
