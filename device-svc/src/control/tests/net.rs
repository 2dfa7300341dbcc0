//! Uplinks and network interfaces over the sockets.

use super::*;
use crate::metrics::DropReason;

fn uplink_settings(name: &str, backend: &str) -> v1::UplinkSettings {
    let options = Options::default().with("name", Some(name)).with_typed_table("backend", Some(backend)).unwrap();
    wire::uplink_settings(&options.uplink().unwrap())
}

fn net_settings(name: &str, uplink: &str) -> v1::FunctionSettings {
    v1::FunctionSettings {
        name: name.to_owned(),
        r#type: "net".to_owned(),
        uplink: uplink.to_owned(),
        mtu: 1400,
        link: Some(v1::Link { socket: format!("/tmp/{name}.sock"), ..Default::default() }),
        limit: Some(v1::Limit { packets: 5, receive_bandwidth: 6, ..Default::default() }),
        ..Default::default()
    }
}

#[tokio::test]
async fn uplinks_and_network_interfaces_over_the_socket() {
    let served = Served::start(&[]).await;
    let mut card = served.card().await;
    let settings = uplink_settings("lan", "null");
    let request = v1::CreateUplinkRequest { settings: Some(settings.clone()) };
    let reply = card.create_uplink(request.clone()).await.unwrap().into_inner();
    assert!(reply.created);
    let uplink = reply.uplink.unwrap();
    assert_eq!((uplink.settings.unwrap(), uplink.carrier, uplink.mtu_max), (settings, true, 1450));
    assert!(!card.create_uplink(request).await.unwrap().into_inner().created);
    assert_eq!(card.list_uplinks(v1::ListUplinksRequest {}).await.unwrap().into_inner().uplinks.len(), 3);
    let tap = uplink_settings("tap", "tap,name=dray0,netns=blue,mtu=9000");
    let status = card.create_uplink(v1::CreateUplinkRequest { settings: Some(tap) }).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "uplink \"tap\": the kernel has no taps"));

    let request = v1::CreateFunctionRequest { settings: Some(net_settings("n", "lan")) };
    let made = card.create_function(request).await.unwrap().into_inner().function.unwrap();
    let settings = made.settings.unwrap();
    assert_eq!((settings.queue_pairs, settings.queue_size, settings.mtu, settings.queues), (1, 256, 1400, 0));
    assert_eq!(settings.mac.len(), "52:54:00:12:34:56".len());
    let limit = settings.limit.unwrap();
    assert_eq!((limit.packets, limit.receive_bandwidth, limit.burst_us), (5, 6, 1_000_000));
    assert_eq!(made.link_state, Some(v1::LinkState { set_up: true, carrier: true }));
    assert_eq!(made.queues, 2, "over vhost-user the VMM keeps the control queue");
    assert_eq!((made.volume_uuid.as_str(), made.size_bytes), ("", 0));
    // What is shown can be sent back.
    let again = v1::CreateFunctionRequest { settings: Some(settings) };
    assert!(!card.create_function(again).await.unwrap().into_inner().created);

    let name = || "lan".to_owned();
    assert_eq!(card.get_uplink(v1::GetUplinkRequest { name: name() }).await.unwrap().into_inner().functions, ["n"]);
    let status = card.delete_uplink(v1::DeleteUplinkRequest { name: name() }).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    card.delete_function(v1::DeleteFunctionRequest { name: "n".to_owned() }).await.unwrap();
    card.delete_uplink(v1::DeleteUplinkRequest { name: name() }).await.unwrap();
    let status = card.get_uplink(v1::GetUplinkRequest { name: name() }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    served.end().await;
}

#[tokio::test]
async fn a_function_is_set_over_the_socket() {
    let served = Served::start(&["disk", "net0"]).await;
    let mut card = served.card().await;
    let ask = |name: &str| v1::SetFunctionRequest { name: name.to_owned(), ..Default::default() };
    let change = v1::SetFunctionRequest {
        link_up: Some(false),
        mac: Some("02:00:00:00:00:07".to_owned()),
        mtu: Some(1300),
        limit: Some(v1::Limit { transmit_packets: 9, ..Default::default() }),
        ..ask("net0")
    };
    let set = card.set_function(change).await.unwrap().into_inner();
    let settings = set.settings.unwrap();
    assert_eq!((settings.mac.as_str(), settings.mtu), ("02:00:00:00:00:07", 1300));
    assert_eq!(settings.limit.unwrap().transmit_packets, 9);
    assert_eq!(set.link_state, Some(v1::LinkState { set_up: false, carrier: true }));
    let told = served.starter.function("net0").changes.lock().unwrap().pop().unwrap();
    assert_eq!((told.link_up, told.mtu), (Some(false), Some(1300)));

    let limit = v1::SetFunctionRequest { limit: Some(v1::Limit { iops: 9, ..Default::default() }), ..ask("disk") };
    let set = card.set_function(limit).await.unwrap().into_inner();
    assert_eq!(set.settings.unwrap().limit.unwrap().iops, 9);
    // The older way to a limit is open to both types.
    let limit = v1::SetFunctionLimitRequest { name: "net0".to_owned(), limit: Some(v1::Limit::default()) };
    let set = card.set_function_limit(limit).await.unwrap().into_inner();
    assert_eq!(set.settings.unwrap().limit.unwrap().transmit_packets, 0);

    let mut refused = async |request| {
        let status = card.set_function(request).await.unwrap_err();
        (status.code(), status.message().to_owned())
    };
    let mac = Some("01:00:00:00:00:00".to_owned());
    let (code, message) = refused(v1::SetFunctionRequest { mac, ..ask("net0") }).await;
    assert_eq!(code, Code::InvalidArgument);
    assert!(
        message.starts_with("function \"net0\": `mac`: \"01:00:00:00:00:00\" is the address of a group"),
        "{message}"
    );
    let (code, message) = refused(v1::SetFunctionRequest { mtu: Some(1451), ..ask("net0") }).await;
    assert_eq!(code, Code::InvalidArgument);
    assert!(message.contains("uplink \"any\" carries no more than 1450 bytes"), "{message}");
    let iops = Some(v1::Limit { iops: 9, ..Default::default() });
    let (code, message) = refused(v1::SetFunctionRequest { limit: iops, ..ask("net0") }).await;
    assert_eq!(code, Code::InvalidArgument);
    assert!(message.ends_with("only the limit of a function of type \"blk\" has it; write `packets`"), "{message}");
    let (code, message) = refused(v1::SetFunctionRequest { link_up: Some(true), ..ask("disk") }).await;
    assert_eq!(
        (code, message.as_str()),
        (Code::InvalidArgument, "function \"disk\": only a function of type \"net\" has a link that can be set")
    );
    let (code, _) = refused(ask("none")).await;
    assert_eq!(code, Code::NotFound);
    served.end().await;
}

#[tokio::test]
async fn statistics_of_frames() {
    let served = Served::start(&["disk", "net0"]).await;
    let function = served.starter.function("net0");
    let counters = crate::control::FunctionRun::counters(&*function);
    counters[0].net.packets.add(4);
    counters[0].net.drops.add(DropReason::TooLong, 1);
    let stats = served.card().await.get_stats(v1::GetStatsRequest {}).await.unwrap().into_inner();
    let [disk, net] = &stats.functions[..] else { panic!("{stats:?}") };
    assert_eq!((disk.r#type.as_str(), net.r#type.as_str()), ("blk", "net"));
    assert!(disk.queues.iter().all(|queue| queue.net.is_none() && queue.kinds.len() == 6));
    let names = |function: &v1::FunctionStats| -> Vec<String> {
        function.queues.iter().map(|queue| queue.name.clone()).collect()
    };
    assert_eq!(names(disk), ["queue_0", "queue_1"]);
    assert_eq!(names(net), ["rx_queue_0", "tx_queue_0", "control_queue"]);
    let frames = net.queues[0].net.as_ref().unwrap();
    assert_eq!(frames.packets, 4);
    let dropped: Vec<(&str, u64)> = frames.drops.iter().map(|drop| (drop.reason.as_str(), drop.packets)).collect();
    assert_eq!(dropped.len(), DropReason::ALL.len());
    assert_eq!(dropped[0], ("too_long", 1));
    assert!(dropped[1..].iter().all(|(_, packets)| *packets == 0));
    served.end().await;
}

#[tokio::test]
async fn host_shim_sees_network_interfaces_and_their_links() {
    let served = Served::start(&["net0"]).await;
    let mut view = served.view().await;
    let list = view.list_function_views(v1::ListFunctionViewsRequest {}).await.unwrap().into_inner();
    let shown = &list.functions[0];
    assert_eq!((shown.r#type.as_str(), shown.volume_uuid.as_str(), shown.serial.as_str()), ("net", "", ""));
    assert_eq!(shown.link_state, Some(v1::LinkState { set_up: true, carrier: true }));
    let mac = served.card().await.get_function(v1::GetFunctionRequest { name: "net0".to_owned() }).await.unwrap();
    assert_eq!(shown.mac, mac.into_inner().settings.unwrap().mac);

    let request = v1::FollowEventsRequest { after: list.position };
    let mut events = view.follow_events(request).await.unwrap().into_inner();
    assert!(matches!(next(&mut events).await, Some(Item::Position(_))));
    let mut expect = async |kind: v1::EventKind| match next(&mut events).await {
        Some(Item::Event(event)) => assert_eq!((event.kind(), event.volume_uuid.as_str()), (kind, "")),
        other => panic!("{kind:?} expected, not {other:?}"),
    };
    served.carrier.set(false);
    expect(v1::EventKind::LinkDown).await;
    served.carrier.set(true);
    expect(v1::EventKind::LinkUp).await;
    let down = v1::SetFunctionRequest { name: "net0".to_owned(), link_up: Some(false), ..Default::default() };
    served.card().await.set_function(down).await.unwrap();
    expect(v1::EventKind::LinkDown).await;
    served.end().await;
}

/// What is shown of a tunnel can be sent back.
#[test]
fn tunnels_in_messages() {
    for text in [
        "vxlan,vni=0,local=10.9.0.1,port=4789,learn=listed",
        "geneve,vni=9,local=2001:db8::1,remote=2001:db8::3,,2001:db8::2,mtu=1430,port=7,netns=blue,learn=none",
    ] {
        let settings = uplink_settings("u", text);
        let config = wire::uplink_config(settings.clone()).unwrap();
        assert_eq!(config.backend.to_string(), text);
        assert_eq!(wire::uplink_settings(&config), settings);
    }
    // What is not given is read as the file reads it.
    let vxlan = v1::TunnelUplink { local: "10.9.0.1".to_owned(), ..v1::TunnelUplink::default() };
    let settings = v1::UplinkSettings {
        name: "u".to_owned(),
        backend: Some(v1::UplinkBackend { kind: Some(v1::uplink_backend::Kind::Vxlan(vxlan)) }),
    };
    let error = wire::uplink_config(settings).unwrap_err().to_string();
    assert_eq!(error, "uplink \"u\": backend: `vni` is missing; add `vni = 42`, the number of the network");
}
