//! The counters as Prometheus (OpenMetrics) text. Names and labels are an interface: dashboards live on them.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::inventory::Inventory;
use crate::config::{DeviceConfig, FunctionConfig};
use crate::metrics::{Counter, DropReason, LATENCY_BUCKETS, NetQueue, QueueCounters, ReactorCounters, RequestKind};

/// The text of one scrape.
///
/// # Errors
/// Never in practice: writing to a `String` does not fail.
pub fn metrics_page(inventory: &Arc<Inventory>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("dray");
    registry.register_collector(Box::new(Page(Arc::clone(inventory))));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

struct Page(Arc<Inventory>);

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Page")
    }
}

/// One queue of one function.
struct Queue {
    function: String,
    number: String,
    counters: Arc<QueueCounters>,
    /// Of a network interface.
    net: Option<NetQueue>,
}

impl Queue {
    fn labels(&self) -> [(&str, &str); 2] {
        [("function", &self.function), ("queue", &self.number)]
    }

    fn labels_with<'a>(&'a self, key: &'a str, value: &'a str) -> [(&'a str, &'a str); 3] {
        [("function", &self.function), ("queue", &self.number), (key, value)]
    }
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (mut disks, mut nets) = (Vec::new(), Vec::new());
        for function in self.0.queue_counters() {
            let FunctionConfig { name, device, .. } = function.config;
            for (index, counters) in (0_u16..).zip(function.queues) {
                let queue = Queue { function: name.clone(), number: index.to_string(), counters, net: None };
                match &device {
                    DeviceConfig::Blk(_) => disks.push(queue),
                    DeviceConfig::Net(net) => {
                        nets.push(Queue { net: Some(NetQueue::of(index, net.queue_pairs)), ..queue });
                    }
                }
            }
        }
        encode_requests(&mut encoder, &disks)?;
        encode_frames(&mut encoder, &nets)?;
        disks.extend(nets);
        encode_queues(&mut encoder, &disks)?;
        encode_dma(&mut encoder, &disks)?;
        encode_reactors(&mut encoder, &self.0.reactor_counters())
    }
}

fn count(encoder: &mut MetricEncoder<'_>, labels: &impl EncodeLabelSet, value: u64) -> fmt::Result {
    encoder.encode_family(labels)?.encode_counter::<NoLabelSet, u64, u64>(&value, None)
}

type Pick = fn(&QueueCounters) -> &Counter;

/// Counters without labels of their own.
fn encode_each<const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    queues: &[Queue],
    counters: [(&str, &str, Option<&Unit>, Pick); N],
) -> fmt::Result {
    for (name, help, unit, pick) in counters {
        let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for queue in queues {
            count(&mut metric, &queue.labels(), pick(&queue.counters).get())?;
        }
    }
    Ok(())
}

/// What queues of all types count.
fn encode_queues(encoder: &mut DescriptorEncoder<'_>, queues: &[Queue]) -> fmt::Result {
    let counters: [(&str, &str, Option<&Unit>, Pick); 2] = [
        ("interrupts", "Interrupts raised", None, |queue| &queue.interrupts),
        ("doorbells", "Doorbells taken", None, |queue| &queue.doorbells),
    ];
    encode_each(encoder, queues, counters)
}

/// The frames of network interfaces. A control queue has none.
fn encode_frames(encoder: &mut DescriptorEncoder<'_>, queues: &[Queue]) -> fmt::Result {
    let carrying = || {
        queues.iter().filter_map(|queue| match queue.net? {
            NetQueue::Receive(_) => Some((queue, "receive")),
            NetQueue::Transmit(_) => Some((queue, "transmit")),
            NetQueue::Control => None,
        })
    };
    let counters: [(&str, &str, Option<&Unit>, Pick); 7] = [
        ("net_packets", "Frames carried", None, |queue| &queue.net.packets),
        ("net", "Bytes of them", Some(&Unit::Bytes), |queue| &queue.net.bytes),
        ("net_broadcasts", "Of them, those to all", None, |queue| &queue.net.broadcasts),
        ("net_multicasts", "Of them, those to a group", None, |queue| &queue.net.multicasts),
        ("net_undone_checksums", "Of them, those with a checksum to compute", None, |queue| {
            &queue.net.undone_checksums
        }),
        ("net_undone_segmentations", "Of them, those to be cut", None, |queue| &queue.net.undone_segmentations),
        ("net_throttled", "Frames that waited for a limit", None, |queue| &queue.throttled),
    ];
    for (name, help, unit, pick) in counters {
        let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for (queue, direction) in carrying() {
            count(&mut metric, &queue.labels_with("direction", direction), pick(&queue.counters).get())?;
        }
    }
    let mut drops = encoder.encode_descriptor("net_drops", "Frames not carried", None, MetricType::Counter)?;
    for (queue, direction) in carrying() {
        for reason in DropReason::ALL {
            let labels = [
                ("function", queue.function.as_str()),
                ("queue", queue.number.as_str()),
                ("direction", direction),
                ("reason", reason.name()),
            ];
            count(&mut drops, &labels, queue.counters.net.drops.get(reason))?;
        }
    }
    Ok(())
}

fn encode_requests(encoder: &mut DescriptorEncoder<'_>, queues: &[Queue]) -> fmt::Result {
    let mut requests = encoder.encode_descriptor("requests", "Completed requests", None, MetricType::Counter)?;
    for queue in queues {
        for kind in RequestKind::ALL {
            let labels = queue.labels_with("kind", kind.name());
            count(&mut requests, &labels, queue.counters.requests[kind as usize].get())?;
        }
    }
    let mut bytes = encoder.encode_descriptor("payload", "Payload of them", Some(&Unit::Bytes), MetricType::Counter)?;
    for queue in queues {
        for kind in RequestKind::ALL {
            let labels = queue.labels_with("kind", kind.name());
            count(&mut bytes, &labels, queue.counters.bytes[kind as usize].get())?;
        }
    }
    let counters: [(&str, &str, Option<&Unit>, Pick); 2] = [
        ("request_errors", "Completed requests with a status other than OK", None, |queue| &queue.errors),
        ("requests_throttled", "Requests that waited for a limit", None, |queue| &queue.throttled),
    ];
    encode_each(encoder, queues, counters)?;
    let gauges: [(&str, &str, Pick); 2] = [
        ("requests_in_flight", "Requests popped and not yet completed", |queue| &queue.in_flight),
        ("requests_held", "Of them, those held because the storage server is away", |queue| &queue.held),
    ];
    for (name, help, pick) in gauges {
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for queue in queues {
            metric.encode_family(&queue.labels())?.encode_gauge(&pick(&queue.counters).get())?;
        }
    }
    let help = "From popped to completed";
    let mut latency =
        encoder.encode_descriptor("request_latency", help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for queue in queues {
        let histogram = &queue.counters.latency;
        let mut buckets = [(0.0, 0); LATENCY_BUCKETS];
        for (power, (bucket, counter)) in buckets.iter_mut().zip(&histogram.buckets).enumerate() {
            let bound = if power == LATENCY_BUCKETS - 1 { f64::INFINITY } else { (1_u64 << power) as f64 / 1e6 };
            *bucket = (bound, counter.get());
        }
        // From the buckets read, so that count and buckets agree while both go on.
        let total = buckets.iter().map(|(_, count)| count).sum();
        let sum_s = histogram.sum_ns.get() as f64 / 1e9;
        latency.encode_family(&queue.labels())?.encode_histogram::<NoLabelSet>(sum_s, total, &buckets, None)?;
    }
    Ok(())
}

fn encode_dma(encoder: &mut DescriptorEncoder<'_>, queues: &[Queue]) -> fmt::Result {
    let both: [(&str, &str, Option<&Unit>, Pick, Pick); 2] = [
        ("dma_transactions", "DMA copies, without polls that found nothing", None, |q| &q.dma_reads, |q| &q.dma_writes),
        ("dma", "Bytes of them", Some(&Unit::Bytes), |q| &q.dma_read_bytes, |q| &q.dma_write_bytes),
    ];
    for (name, help, unit, from_host, to_host) in both {
        let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for queue in queues {
            count(&mut metric, &queue.labels_with("direction", "from_host"), from_host(&queue.counters).get())?;
            count(&mut metric, &queue.labels_with("direction", "to_host"), to_host(&queue.counters).get())?;
        }
    }
    let counters: [(&str, &str, Option<&Unit>, Pick); 3] = [
        ("dma_empty_polls", "Polls of a ring that found nothing", None, |queue| &queue.dma_empty_polls),
        ("dma_lent", "Ranges of VM memory lent in place of a copy", None, |queue| &queue.dma_lent),
        ("dma_lent", "Bytes of them", Some(&Unit::Bytes), |queue| &queue.dma_lent_bytes),
    ];
    encode_each(encoder, queues, counters)
}

fn encode_reactors(encoder: &mut DescriptorEncoder<'_>, reactors: &[Arc<ReactorCounters>]) -> fmt::Result {
    let numbered = || reactors.iter().enumerate().map(|(number, reactor)| (number.to_string(), reactor));
    let seconds = |ns: &Counter| ns.get() as f64 / 1e9;
    let help = "Time that a reactor was busy, polled in vain, or slept";
    let mut time = encoder.encode_descriptor("reactor_time", help, Some(&Unit::Seconds), MetricType::Counter)?;
    for (number, reactor) in numbered() {
        let states = [("busy", &reactor.busy_ns), ("idle", &reactor.idle_ns), ("asleep", &reactor.asleep_ns)];
        for (state, ns) in states {
            let labels = [("reactor", number.as_str()), ("state", state)];
            time.encode_family(&labels)?.encode_counter::<NoLabelSet, f64, u64>(&seconds(ns), None)?;
        }
    }
    let help = "Share of its life that a reactor was busy, 0 to 1";
    let mut share = encoder.encode_descriptor("reactor_busy_share", help, None, MetricType::Gauge)?;
    for (number, reactor) in numbered() {
        let all = seconds(&reactor.busy_ns) + seconds(&reactor.idle_ns) + seconds(&reactor.asleep_ns);
        let busy = if all > 0.0 { seconds(&reactor.busy_ns) / all } else { 0.0 };
        share.encode_family(&[("reactor", number.as_str())])?.encode_gauge(&busy)?;
    }
    let help = "A reactor's longest turn";
    let mut longest = encoder.encode_descriptor("reactor_turn_max", help, Some(&Unit::Seconds), MetricType::Gauge)?;
    for (number, reactor) in numbered() {
        longest.encode_family(&[("reactor", number.as_str())])?.encode_gauge(&seconds(&reactor.turn_ns_max))?;
    }
    let mut turns = encoder.encode_descriptor("reactor_turns", "Turns of a reactor", None, MetricType::Counter)?;
    for (number, reactor) in numbered() {
        for (state, counter) in [("busy", &reactor.turns_busy), ("idle", &reactor.turns_idle)] {
            count(&mut turns, &[("reactor", number.as_str()), ("state", state)], counter.get())?;
        }
    }
    let mut sleeps =
        encoder.encode_descriptor("reactor_sleeps", "Times it went to sleep", None, MetricType::Counter)?;
    for (number, reactor) in numbered() {
        count(&mut sleeps, &[("reactor", number.as_str())], reactor.sleeps.get())?;
    }
    let mut lanes =
        encoder.encode_descriptor("reactor_lanes", "Queues that a reactor turns", None, MetricType::Gauge)?;
    for (number, reactor) in numbered() {
        lanes.encode_family(&[("reactor", number.as_str())])?.encode_gauge(&reactor.lanes.get())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
