//! The control interface end to end: clients over real sockets, functions that are fakes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod net;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::v1;
use proto::v1::card_client::CardClient;
use proto::v1::follow_events_reply::Item;
use proto::v1::host_view_client::HostViewClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tonic::Code;
use tonic::transport::Channel;

use super::fake::{FakeStarter, config, open_fake, open_fake_network};
use super::seam::Standing;
use super::serve::{Card, ServeError};
use super::wire;
use crate::backend::net::Carrier;
use crate::config::{Config, ControlAddress, Options};

/// Far longer than anything here takes: only a test that hangs meets it.
const BOUND: Duration = Duration::from_secs(60);

/// A card that serves in a temporary folder.
struct Served {
    _folder: tempfile::TempDir,
    config: Config,
    starter: Arc<FakeStarter>,
    carrier: Arc<Carrier>,
    metrics: SocketAddr,
    stop: watch::Sender<bool>,
    ended: tokio::task::JoinHandle<Result<(), ServeError>>,
}

impl Served {
    async fn start(functions: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(functions);
        config.control.listen = ControlAddress::parse("unix:card.sock", folder.path()).unwrap();
        config.control.shim = ControlAddress::parse("unix:shim.sock", folder.path()).unwrap();
        config.control.metrics = Some("127.0.0.1:0".parse().unwrap());
        let starter = Arc::new(FakeStarter::default());
        let carrier = Arc::new(Carrier::new(true));
        let network = open_fake_network(&carrier);
        let card = Card::bind(&config, Arc::clone(&starter) as Arc<_>, open_fake(), network).unwrap();
        let metrics = card.metrics_address().unwrap();
        let (stop, stopping) = watch::channel(false);
        let (ready, is_ready) = oneshot::channel();
        let ended = tokio::spawn(card.serve(config.clone(), stopping, move || ready.send(()).unwrap()));
        is_ready.await.unwrap();
        Self { _folder: folder, config, starter, carrier, metrics, stop, ended }
    }

    async fn card(&self) -> CardClient<Channel> {
        let socket = self.config.control.listen.socket();
        CardClient::new(proto::connect(socket.to_str().unwrap()).await.unwrap())
    }

    async fn view(&self) -> HostViewClient<Channel> {
        let socket = self.config.control.shim.socket();
        HostViewClient::new(proto::connect(socket.to_str().unwrap()).await.unwrap())
    }

    async fn end(self) {
        self.stop.send_replace(true);
        tokio::time::timeout(BOUND, self.ended).await.unwrap().unwrap().unwrap();
        assert!(!self.config.control.listen.socket().exists());
    }
}

async fn next(stream: &mut tonic::Streaming<v1::FollowEventsReply>) -> Option<Item> {
    tokio::time::timeout(BOUND, stream.message()).await.unwrap().unwrap().and_then(|reply| reply.item)
}

fn volume_settings(name: &str, backend: &str) -> v1::VolumeSettings {
    let options = Options::default().with("name", Some(name)).with_typed_table("backend", Some(backend)).unwrap();
    wire::volume_settings(&options.volume(Path::new("/")).unwrap())
}

#[tokio::test]
async fn volumes_and_functions_over_the_socket() {
    let served = Served::start(&["f"]).await;
    let mut card = served.card().await;
    let info = card.get_info(v1::GetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.volumes, info.uplinks, info.functions, info.reactors), (2, 2, 1, 1));

    let settings = volume_settings("x", "null,size=4M");
    let request = v1::CreateVolumeRequest { settings: Some(settings.clone()) };
    let reply = card.create_volume(request.clone()).await.unwrap().into_inner();
    assert!(reply.created);
    assert_eq!(reply.volume.unwrap().settings.unwrap(), settings);
    assert!(!card.create_volume(request).await.unwrap().into_inner().created);

    let function = v1::FunctionSettings {
        name: "n".to_owned(),
        r#type: "blk".to_owned(),
        volume: "x".to_owned(),
        link: Some(v1::Link { socket: "/tmp/n.sock".to_owned(), ..Default::default() }),
        limit: Some(v1::Limit { iops: 5, ..Default::default() }),
        ..Default::default()
    };
    let request = v1::CreateFunctionRequest { settings: Some(function) };
    let reply = card.create_function(request.clone()).await.unwrap().into_inner();
    let made = reply.function.unwrap();
    let settings = made.settings.unwrap();
    assert_eq!((settings.queues, settings.queue_size, settings.packed), (1, 256, Some(true)));
    assert_eq!(made.size_bytes, 4 << 20);
    // What is shown can be sent back.
    let again = v1::CreateFunctionRequest { settings: Some(settings) };
    assert!(!card.create_function(again).await.unwrap().into_inner().created);
    let limit = v1::SetFunctionLimitRequest { name: "n".to_owned(), limit: Some(v1::Limit::default()) };
    let limited = card.set_function_limit(limit).await.unwrap().into_inner();
    assert_eq!(limited.settings.unwrap().limit.unwrap().iops, 0);

    let resize = v1::ResizeVolumeRequest { name: "x".to_owned(), size_bytes: 8 << 20, shrink: false };
    assert_eq!(card.resize_volume(resize).await.unwrap().into_inner().size_bytes, 8 << 20);
    let name = || "x".to_owned();
    let status = card.delete_volume(v1::DeleteVolumeRequest { name: name() }).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    card.delete_function(v1::DeleteFunctionRequest { name: "n".to_owned() }).await.unwrap();
    card.delete_volume(v1::DeleteVolumeRequest { name: name() }).await.unwrap();
    let status = card.get_volume(v1::GetVolumeRequest { name: name() }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert_eq!(card.list_functions(v1::ListFunctionsRequest {}).await.unwrap().into_inner().functions.len(), 1);
    served.end().await;
}

#[tokio::test]
async fn bad_settings_have_a_status_and_a_line() {
    let served = Served::start(&[]).await;
    let mut card = served.card().await;
    let mut create = async |settings| {
        let request = v1::CreateVolumeRequest { settings: Some(settings) };
        let status = card.create_volume(request).await.unwrap_err();
        (status.code(), status.message().to_owned())
    };
    let (code, message) = create(v1::VolumeSettings::default()).await;
    assert_eq!((code, message.as_str()), (Code::InvalidArgument, "volume: `name` is missing; add `name = \"…\"`"));
    let (code, _) = create(v1::VolumeSettings { name: "x".to_owned(), ..Default::default() }).await;
    assert_eq!(code, Code::InvalidArgument);
    let (code, message) = create(volume_settings("v", "null,size=9M")).await;
    assert_eq!(code, Code::AlreadyExists);
    assert!(message.starts_with("volume \"v\": `backend`: it exists with another value"), "{message}");
    let (code, _) = create(volume_settings("x", "file,path=/none")).await;
    assert_eq!(code, Code::Unavailable);
    served.end().await;
}

#[tokio::test]
async fn statistics_over_the_socket() {
    let served = Served::start(&["f"]).await;
    let function = served.starter.function("f");
    super::FunctionRun::counters(&*function)[1].errors.add(4);
    let stats = served.card().await.get_stats(v1::GetStatsRequest {}).await.unwrap().into_inner();
    assert_eq!(stats.functions[0].queues[1].errors, 4);
    assert_eq!(stats.functions[0].queues[1].latency_buckets.len(), crate::metrics::LATENCY_BUCKETS);
    assert_eq!(stats.reactors.len(), 1);
    served.end().await;
}

#[tokio::test]
async fn host_shim_lists_and_follows_without_loss() {
    let served = Served::start(&["f"]).await;
    let mut view = served.view().await;
    let list = view.list_function_views(v1::ListFunctionViewsRequest {}).await.unwrap().into_inner();
    assert_eq!(list.functions[0].name, "f");
    assert_eq!(list.functions[0].link, "vhost-user:/tmp/f.sock");
    let after = list.position.clone().unwrap();
    // Between the list and following: nothing of it may be lost.
    served.starter.function("f").stand(Standing::Attached { running: 1 });
    let request = v1::FollowEventsRequest { after: list.position };
    let mut events = view.follow_events(request).await.unwrap().into_inner();
    assert_eq!(next(&mut events).await, Some(Item::Position(after.clone())));
    let mut expect = async |kind: v1::EventKind| match next(&mut events).await {
        Some(Item::Event(event)) => {
            assert_eq!(event.kind(), kind);
            event.sequence
        }
        other => panic!("{kind:?} expected, not {other:?}"),
    };
    assert_eq!(expect(v1::EventKind::Attached).await, after.sequence + 1);
    let reason = "a loop".to_owned();
    served.starter.function("f").stand(Standing::NeedsReset { reason });
    assert_eq!(expect(v1::EventKind::NeedsReset).await, after.sequence + 2);
    let delete = v1::DeleteFunctionRequest { name: "f".to_owned() };
    served.card().await.delete_function(delete).await.unwrap();
    assert_eq!(expect(v1::EventKind::Detached).await, after.sequence + 3);
    assert_eq!(expect(v1::EventKind::Deleted).await, after.sequence + 4);
    // Followers do not keep the card from ending; their streams end with it.
    served.end().await;
    let ended = tokio::time::timeout(BOUND, events.message()).await.unwrap();
    assert!(!matches!(ended, Ok(Some(_))), "{ended:?}");
}

#[tokio::test]
async fn a_follower_is_told_what_it_missed() {
    let served = Served::start(&["f"]).await;
    let function = served.starter.function("f");
    let instance = served.card().await.get_info(v1::GetInfoRequest {}).await.unwrap().into_inner().instance;
    for _ in 0..super::events::EVENTS_KEPT {
        function.stand(Standing::Attached { running: 1 });
        function.stand(Standing::Waiting);
    }
    let total = 1 + 2 * super::events::EVENTS_KEPT as u64;
    let position = |instance: &str, sequence| v1::Position { instance: instance.to_owned(), sequence };
    let mut view = served.view().await;

    let request = v1::FollowEventsRequest { after: Some(position(&instance, 1)) };
    let mut events = view.follow_events(request).await.unwrap().into_inner();
    assert_eq!(next(&mut events).await, Some(Item::Position(position(&instance, 1))));
    let missed = total - 1 - super::events::EVENTS_KEPT as u64;
    let expected = v1::Missed { events: missed, position: Some(position(&instance, 1 + missed)) };
    assert_eq!(next(&mut events).await, Some(Item::Missed(expected)));
    for sequence in missed + 2..=total {
        match next(&mut events).await {
            Some(Item::Event(event)) => assert_eq!(event.sequence, sequence),
            other => panic!("event {sequence} expected, not {other:?}"),
        }
    }

    // A position of a card that is no more.
    let request = v1::FollowEventsRequest { after: Some(position("another", 7)) };
    let mut events = view.follow_events(request).await.unwrap().into_inner();
    assert!(matches!(next(&mut events).await, Some(Item::Position(_))));
    assert_eq!(
        next(&mut events).await,
        Some(Item::Missed(v1::Missed { events: 0, position: Some(position(&instance, 0)) }))
    );
    served.end().await;
}

#[tokio::test]
async fn the_narrow_socket_has_no_operators_service() {
    use std::os::unix::fs::PermissionsExt;
    let served = Served::start(&["f"]).await;
    let shim = served.config.control.shim.socket();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(served.config.control.listen.socket()), mode(shim)), (0o600, 0o660));
    let mut card = CardClient::new(proto::connect(shim.to_str().unwrap()).await.unwrap());
    let status = card.delete_function(v1::DeleteFunctionRequest { name: "f".to_owned() }).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    served.end().await;
}

#[tokio::test]
async fn a_second_card_is_refused_and_disturbs_nothing() {
    let served = Served::start(&["f"]).await;
    let network = open_fake_network(&served.carrier);
    let second = Card::bind(&served.config, Arc::new(FakeStarter::default()), open_fake(), network);
    let error = second.err().unwrap().to_string();
    assert!(error.contains("card.sock is in use by a running service"), "{error}");
    served.card().await.get_info(v1::GetInfoRequest {}).await.unwrap();
    served.end().await;
}

#[tokio::test]
async fn what_cannot_start_leaves_no_socket() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&["f", "refused"]);
    config.control.listen = ControlAddress::parse("unix:card.sock", folder.path()).unwrap();
    config.control.shim = ControlAddress::parse("unix:shim.sock", folder.path()).unwrap();
    let network = open_fake_network(&Arc::default());
    let card = Card::bind(&config, Arc::new(FakeStarter::default()), open_fake(), network).unwrap();
    let (_stop, stopping) = watch::channel(false);
    let error = card.serve(config.clone(), stopping, || panic!("not ready")).await.unwrap_err();
    assert_eq!(error.to_string(), "function \"refused\": its socket is in use");
    assert!(!config.control.listen.socket().exists() && !config.control.shim.socket().exists());
}

#[tokio::test]
async fn metrics_over_http() {
    let served = Served::start(&["f"]).await;
    let ask = async |request: &str| {
        let exchange = async {
            let mut stream = TcpStream::connect(served.metrics).await.unwrap();
            // The card may answer and close before it has taken all of a request that is too long.
            let _ = stream.write_all(request.as_bytes()).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8(answer).unwrap()
        };
        tokio::time::timeout(BOUND, exchange).await.unwrap()
    };
    let page = ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    let (head, body) = page.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}", body.len())));
    assert!(body.contains("dray_requests_total{function=\"f\",queue=\"0\",kind=\"read\"} 0"), "{body}");
    assert!(ask("GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 404 "));
    assert!(ask("POST /metrics HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405 "));
    assert!(ask("hello\r\n\r\n").await.starts_with("HTTP/1.1 400 "));
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat((8 << 10) - 26));
    assert!(ask(&long).await.starts_with("HTTP/1.1 431 "), "a request of exactly 8 KiB without an end");
    served.end().await;
}
