//! What is counted, as messages.

use proto::v1;

use crate::config::DeviceConfig;
use crate::control::inventory::FunctionCounters;
use crate::metrics::{Counter, DropReason, NetCounters, NetQueue, QueueCounters, ReactorCounters, RequestKind};

pub(in crate::control) fn function_stats(function: FunctionCounters) -> v1::FunctionStats {
    let device = &function.config.device;
    let queues = (0_u16..).zip(&function.queues).map(|(index, counters)| match device {
        DeviceConfig::Blk(_) => {
            let kinds = RequestKind::ALL.into_iter().map(|kind| v1::KindStats {
                kind: kind.name().to_owned(),
                requests: counters.requests[kind as usize].get(),
                bytes: counters.bytes[kind as usize].get(),
            });
            v1::QueueStats { name: format!("queue_{index}"), kinds: kinds.collect(), ..queue_stats(index, counters) }
        }
        DeviceConfig::Net(net) => v1::QueueStats {
            name: NetQueue::of(index, net.queue_pairs).name(),
            net: Some(net_stats(&counters.net)),
            ..queue_stats(index, counters)
        },
    });
    let (queues, r#type) = (queues.collect(), device.type_name().to_owned());
    v1::FunctionStats { name: function.config.name, queues, r#type }
}

/// What queues of all types count.
fn queue_stats(index: u16, counters: &QueueCounters) -> v1::QueueStats {
    v1::QueueStats {
        index: index.into(),
        errors: counters.errors.get(),
        in_flight: counters.in_flight.get(),
        held: counters.held.get(),
        throttled: counters.throttled.get(),
        interrupts: counters.interrupts.get(),
        doorbells: counters.doorbells.get(),
        latency_buckets: counters.latency.buckets.iter().map(Counter::get).collect(),
        latency_sum_ns: counters.latency.sum_ns.get(),
        dma_reads: counters.dma_reads.get(),
        dma_writes: counters.dma_writes.get(),
        dma_read_bytes: counters.dma_read_bytes.get(),
        dma_write_bytes: counters.dma_write_bytes.get(),
        dma_empty_polls: counters.dma_empty_polls.get(),
        dma_lent: counters.dma_lent.get(),
        dma_lent_bytes: counters.dma_lent_bytes.get(),
        ..v1::QueueStats::default()
    }
}

fn net_stats(counters: &NetCounters) -> v1::NetStats {
    let drops = DropReason::ALL
        .into_iter()
        .map(|reason| v1::DropStats { reason: reason.name().to_owned(), packets: counters.drops.get(reason) });
    v1::NetStats {
        packets: counters.packets.get(),
        bytes: counters.bytes.get(),
        broadcasts: counters.broadcasts.get(),
        multicasts: counters.multicasts.get(),
        drops: drops.collect(),
        undone_checksums: counters.undone_checksums.get(),
        undone_segmentations: counters.undone_segmentations.get(),
    }
}

pub(in crate::control) fn reactor_stats(index: usize, counters: &ReactorCounters) -> v1::ReactorStats {
    v1::ReactorStats {
        index: index as u32,
        turns_busy: counters.turns_busy.get(),
        turns_idle: counters.turns_idle.get(),
        busy_ns: counters.busy_ns.get(),
        idle_ns: counters.idle_ns.get(),
        asleep_ns: counters.asleep_ns.get(),
        sleeps: counters.sleeps.get(),
        turn_ns_max: counters.turn_ns_max.get(),
        lanes: counters.lanes.get(),
    }
}
