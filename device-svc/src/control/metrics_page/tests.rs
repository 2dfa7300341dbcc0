//! The page is well formed, and says what the counters say.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;

use super::*;
use crate::control::fake::{config, inventory};
use crate::control::seam::FunctionStarter;

/// Every sample by its name with labels; panics on a line that is neither a sample nor a comment.
fn samples(page: &str) -> HashMap<String, f64> {
    assert!(page.ends_with("# EOF\n"), "{page}");
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    let mut samples = HashMap::new();
    for line in lines {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let metric = name.split('{').next().unwrap();
        assert!(
            metric.starts_with("dray_") && metric.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'),
            "{line}"
        );
        let value: f64 = value.parse().unwrap();
        assert!(samples.insert(name.to_owned(), value).is_none(), "twice: {line}");
    }
    samples
}

#[test]
fn counters_appear() {
    let (inventory, starter) = inventory();
    inventory.start_all(&config(&["f", "g"])).unwrap();
    let function = inventory.queue_counters().remove(0);
    let queue = &function.queues[1];
    queue.requests[RequestKind::Read as usize].add(3);
    queue.bytes[RequestKind::Read as usize].add(12288);
    queue.errors.add(1);
    queue.in_flight.set(5);
    queue.held.set(2);
    queue.dma_reads.add(7);
    queue.dma_write_bytes.add(4096);
    queue.latency.record(900);
    queue.latency.record(1_500);
    queue.latency.record(60_000_000_000);
    starter.reactor().busy_ns.add(1_000_000_000);
    starter.reactor().asleep_ns.add(3_000_000_000);
    starter.reactor().turn_ns_max.raise(2_000_000);
    assert_eq!(starter.reactors().len(), 1);

    let samples = samples(&metrics_page(&inventory).unwrap());
    let of = |name: &str| *samples.get(name).unwrap_or_else(|| panic!("{name} is missing in {samples:#?}"));
    assert_eq!(of("dray_requests_total{function=\"f\",queue=\"1\",kind=\"read\"}"), 3.0);
    assert_eq!(of("dray_requests_total{function=\"f\",queue=\"0\",kind=\"read\"}"), 0.0);
    assert_eq!(of("dray_requests_total{function=\"g\",queue=\"1\",kind=\"write_zeroes\"}"), 0.0);
    assert_eq!(of("dray_payload_bytes_total{function=\"f\",queue=\"1\",kind=\"read\"}"), 12288.0);
    assert_eq!(of("dray_request_errors_total{function=\"f\",queue=\"1\"}"), 1.0);
    assert_eq!(of("dray_requests_in_flight{function=\"f\",queue=\"1\"}"), 5.0);
    assert_eq!(of("dray_requests_held{function=\"f\",queue=\"1\"}"), 2.0);
    assert_eq!(of("dray_dma_transactions_total{function=\"f\",queue=\"1\",direction=\"from_host\"}"), 7.0);
    assert_eq!(of("dray_dma_bytes_total{function=\"f\",queue=\"1\",direction=\"to_host\"}"), 4096.0);
    assert_eq!(of("dray_request_latency_seconds_count{function=\"f\",queue=\"1\"}"), 3.0);
    assert!((of("dray_request_latency_seconds_sum{function=\"f\",queue=\"1\"}") - 60.0).abs() < 0.001);
    assert_eq!(of("dray_request_latency_seconds_bucket{le=\"0.000001\",function=\"f\",queue=\"1\"}"), 1.0);
    assert_eq!(of("dray_request_latency_seconds_bucket{le=\"0.000002\",function=\"f\",queue=\"1\"}"), 2.0);
    assert_eq!(of("dray_request_latency_seconds_bucket{le=\"+Inf\",function=\"f\",queue=\"1\"}"), 3.0);
    assert_eq!(of("dray_reactor_busy_share{reactor=\"0\"}"), 0.25);
    assert_eq!(of("dray_reactor_turn_max_seconds{reactor=\"0\"}"), 0.002);
    assert_eq!(of("dray_reactor_time_seconds_total{reactor=\"0\",state=\"asleep\"}"), 3.0);
}

#[test]
fn frames_appear_by_direction_and_drops_by_reason() {
    let (inventory, _) = inventory();
    inventory.start_all(&config(&["f", "net0"])).unwrap();
    let function = inventory.queue_counters().remove(1);
    assert_eq!((function.config.name.as_str(), function.queues.len()), ("net0", 3));
    let [receive, transmit, control] = &function.queues[..] else { panic!("a pair and the control queue") };
    receive.net.packets.add(3);
    receive.net.bytes.add(4500);
    receive.net.drops.add(DropReason::TooLong, 1);
    transmit.net.packets.add(2);
    transmit.net.broadcasts.add(1);
    transmit.net.drops.add(DropReason::UplinkFull, 1);
    transmit.net.drops.add(DropReason::UplinkFull, 1);
    control.interrupts.add(7);

    let samples = samples(&metrics_page(&inventory).unwrap());
    let of = |name: &str| *samples.get(name).unwrap_or_else(|| panic!("{name} is missing in {samples:#?}"));
    let rx = "function=\"net0\",queue=\"0\",direction=\"receive\"";
    let tx = "function=\"net0\",queue=\"1\",direction=\"transmit\"";
    assert_eq!(of(&format!("dray_net_packets_total{{{rx}}}")), 3.0);
    assert_eq!(of(&format!("dray_net_bytes_total{{{rx}}}")), 4500.0);
    assert_eq!(of(&format!("dray_net_packets_total{{{tx}}}")), 2.0);
    assert_eq!(of(&format!("dray_net_broadcasts_total{{{tx}}}")), 1.0);
    assert_eq!(of(&format!("dray_net_drops_total{{{rx},reason=\"too_long\"}}")), 1.0);
    assert_eq!(of(&format!("dray_net_drops_total{{{tx},reason=\"uplink_full\"}}")), 2.0);
    assert_eq!(of(&format!("dray_net_drops_total{{{tx},reason=\"link_down\"}}")), 0.0);
    assert_eq!(of("dray_interrupts_total{function=\"net0\",queue=\"2\"}"), 7.0);
    // Each type has what it has.
    let has = |start: &str| samples.keys().any(|name| name.starts_with(start));
    assert!(!has("dray_requests_total{function=\"net0\"") && !has("dray_net_packets_total{function=\"f\""));
    assert!(!has("dray_net_packets_total{function=\"net0\",queue=\"2\""));
}

#[test]
fn a_card_without_functions_has_a_page() {
    let (inventory, _) = inventory();
    assert!(!samples(&metrics_page(&inventory).unwrap()).is_empty());
}
