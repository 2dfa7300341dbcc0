//! Serves the metrics page: as much of HTTP/1.1 as a scrape needs, and no more.
//!
//! A request is at most 8 KiB and arrives within 5 seconds; at most 16 are under way; each connection carries one.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::inventory::Inventory;
use super::metrics_page::metrics_page;

const REQUEST_BYTES_MAX: usize = 8 << 10;
const EXCHANGE_TIME_MAX: Duration = Duration::from_secs(5);
const CONNECTIONS_MAX: usize = 16;
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers scrapes until dropped.
pub(super) async fn serve_metrics(listener: TcpListener, inventory: Arc<Inventory>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // Never closed, so a permit always comes.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let inventory = Arc::clone(&inventory);
                tokio::spawn(async move {
                    // A scraper that is slow or goes away concerns nobody else.
                    let _ = tokio::time::timeout(EXCHANGE_TIME_MAX, exchange(stream, inventory)).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: give it time to pass instead of spinning.
                tracing::warn!(%error, "metrics: a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn exchange(mut stream: TcpStream, inventory: Arc<Inventory>) -> std::io::Result<()> {
    let mut request = Vec::with_capacity(1024);
    let (status, body) = loop {
        if request.windows(4).any(|window| window == b"\r\n\r\n") {
            break answer(&request, inventory).await;
        }
        if request.len() >= REQUEST_BYTES_MAX {
            break ("431 Request Header Fields Too Large", "at most 8 KiB\n".to_owned());
        }
        let mut piece = [0; 1024];
        match stream.read(&mut piece).await? {
            0 => return Ok(()),
            count => request.extend_from_slice(&piece[..count]),
        }
    };
    let kind = if status.starts_with("200") { CONTENT_TYPE } else { "text/plain; charset=utf-8" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

async fn answer(request: &[u8], inventory: Arc<Inventory>) -> (&'static str, String) {
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target, version) = (words.next(), words.next(), words.next());
    let known_version = version.is_some_and(|version| version.starts_with(b"HTTP/1."));
    let (Some(method), Some(target), true, None) = (method, target, known_version, words.next()) else {
        return ("400 Bad Request", "not an HTTP/1.1 request\n".to_owned());
    };
    if method != b"GET" {
        return ("405 Method Not Allowed", "only GET\n".to_owned());
    }
    if target.split(|byte| *byte == b'?').next() != Some(b"/metrics") {
        return ("404 Not Found", "only /metrics\n".to_owned());
    }
    match tokio::task::spawn_blocking(move || metrics_page(&inventory)).await {
        Ok(Ok(page)) => ("200 OK", page),
        _ => ("500 Internal Server Error", "the page could not be made\n".to_owned()),
    }
}
