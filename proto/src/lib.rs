//! What the card and its clients say to each other: the gRPC definition of the control interface, compiled.
//!
//! The definition with its documentation is `dray/v1/card.proto`: service `Card` for operators, service `HostView` for
//! host-shim. [`connect`] opens a channel to either.

/// Messages, clients and servers of package `dray.v1`.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    reason = "generated; its documentation is the definition's comments"
)]
pub mod v1 {
    tonic::include_proto!("dray.v1");
}

/// Opens a channel to the card at a Unix socket's absolute path.
///
/// # Errors
/// When nobody answers there.
pub async fn connect(socket: &str) -> Result<tonic::transport::Channel, tonic::transport::Error> {
    tonic::transport::Endpoint::from_shared(format!("unix:{socket}"))?.connect().await
}
