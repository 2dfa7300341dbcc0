//! The statistics of network interfaces: what is carried each way, and what is dropped and why.

use std::collections::BTreeMap;

use proto::v1;
use serde_json::{Value, json};

use super::bytes;
use crate::command::output::columns;

/// What one line shows: a queue, or all queues of a function.
#[derive(Clone, Default)]
pub(super) struct Line {
    function: String,
    /// The queue's number and name.
    queue: Option<(u32, String)>,
    /// To the VM.
    receive: Flow,
    /// From the VM.
    transmit: Flow,
    dma_transactions: u64,
    dma_bytes: u64,
}

/// What goes one way.
#[derive(Clone, Default)]
struct Flow {
    packets: u64,
    bytes: u64,
    broadcasts: u64,
    multicasts: u64,
    undone_checksums: u64,
    undone_segmentations: u64,
    throttled: u64,
    /// Frames by reason.
    drops: BTreeMap<String, u64>,
}

/// Whether these are a network interface's.
pub(super) fn is_net(function: &v1::FunctionStats) -> bool {
    function.r#type == "net"
}

/// One line for each network interface, or for each of its queues: since it was created, or since `before`.
pub(super) fn lines(now: &v1::Stats, before: Option<&v1::Stats>, each_queue: bool) -> Vec<Line> {
    let earlier = before.map(|before| lines(before, None, each_queue)).unwrap_or_default();
    let mut lines = Vec::new();
    for function in now.functions.iter().filter(|function| is_net(function)) {
        let mut whole = Line { function: function.name.clone(), ..Line::default() };
        for queue in &function.queues {
            if each_queue {
                let mut line = Line { queue: Some((queue.index, queue.name.clone())), ..whole.clone() };
                line.add(queue);
                lines.push(line);
            } else {
                whole.add(queue);
            }
        }
        if !each_queue {
            lines.push(whole);
        }
    }
    for line in &mut lines {
        if let Some(same) = earlier.iter().find(|other| other.function == line.function && other.queue == line.queue) {
            line.subtract(same);
        }
    }
    lines
}

/// The lines for people.
pub(super) fn table(lines: &[Line], rate: &dyn Fn(u64) -> u64) -> String {
    let row = |line: &Line| {
        let drops = line.drops();
        let reasons: Vec<String> = drops.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        vec![
            line.function.clone(),
            line.queue.as_ref().map_or_else(|| "all".to_owned(), |(_, name)| name.clone()),
            rate(line.receive.packets).to_string(),
            bytes(rate(line.receive.bytes)),
            rate(line.transmit.packets).to_string(),
            bytes(rate(line.transmit.bytes)),
            drops.values().sum::<u64>().to_string(),
            if reasons.is_empty() { "-".to_owned() } else { reasons.join(", ") },
        ]
    };
    let head = ["FUNCTION", "QUEUE", "RX-PACKETS", "RX-BYTES", "TX-PACKETS", "TX-BYTES", "DROPS", "DROPPED-FOR"];
    columns(&head, &lines.iter().map(row).collect::<Vec<_>>())
}

impl Line {
    fn add(&mut self, queue: &v1::QueueStats) {
        self.dma_transactions += queue.dma_reads + queue.dma_writes;
        self.dma_bytes += queue.dma_read_bytes + queue.dma_write_bytes;
        let Some(net) = &queue.net else { return };
        // The control queue carries no frames, so it may count as either.
        let flow = if queue.name.starts_with("rx_") { &mut self.receive } else { &mut self.transmit };
        flow.packets += net.packets;
        flow.bytes += net.bytes;
        flow.broadcasts += net.broadcasts;
        flow.multicasts += net.multicasts;
        flow.undone_checksums += net.undone_checksums;
        flow.undone_segmentations += net.undone_segmentations;
        flow.throttled += queue.throttled;
        for drop in net.drops.iter().filter(|drop| drop.packets != 0) {
            *flow.drops.entry(drop.reason.clone()).or_default() += drop.packets;
        }
    }

    /// Takes away what was there before. A function that was deleted and made anew counts from 0 again.
    fn subtract(&mut self, before: &Self) {
        self.receive.subtract(&before.receive);
        self.transmit.subtract(&before.transmit);
        less(&mut self.dma_transactions, before.dma_transactions);
        less(&mut self.dma_bytes, before.dma_bytes);
    }

    /// Both ways together.
    fn drops(&self) -> BTreeMap<&str, u64> {
        let mut all = BTreeMap::new();
        for (reason, count) in self.receive.drops.iter().chain(&self.transmit.drops) {
            *all.entry(reason.as_str()).or_default() += count;
        }
        all
    }

    /// The line for programs.
    pub(super) fn json(&self, rate: &dyn Fn(u64) -> u64) -> Value {
        json!({
            "function": self.function, "type": "net",
            "queue": self.queue.as_ref().map(|(index, _)| index), "queue-name": self.queue.as_ref().map(|(_, name)| name),
            "receive": self.receive.json(rate), "transmit": self.transmit.json(rate),
            "dma-transactions": rate(self.dma_transactions), "dma-bytes": rate(self.dma_bytes),
        })
    }
}

impl Flow {
    fn subtract(&mut self, before: &Self) {
        less(&mut self.packets, before.packets);
        less(&mut self.bytes, before.bytes);
        less(&mut self.broadcasts, before.broadcasts);
        less(&mut self.multicasts, before.multicasts);
        less(&mut self.undone_checksums, before.undone_checksums);
        less(&mut self.undone_segmentations, before.undone_segmentations);
        less(&mut self.throttled, before.throttled);
        for (reason, count) in &mut self.drops {
            less(count, before.drops.get(reason).copied().unwrap_or(0));
        }
        self.drops.retain(|_, count| *count != 0);
    }

    fn json(&self, rate: &dyn Fn(u64) -> u64) -> Value {
        json!({
            "packets": rate(self.packets), "bytes": rate(self.bytes),
            "broadcasts": rate(self.broadcasts), "multicasts": rate(self.multicasts),
            "undone-checksums": rate(self.undone_checksums), "undone-segmentations": rate(self.undone_segmentations),
            "throttled": rate(self.throttled), "drops": self.drops,
        })
    }
}

fn less(now: &mut u64, before: u64) {
    *now = now.saturating_sub(before);
}
