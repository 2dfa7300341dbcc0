//! `device-svc stats`: totals, or what happens in each interval. Disks, network interfaces and reactors have a table each.

mod net;

use std::time::Duration;

use anyhow::{Result, anyhow};
use device_svc::config::quantity::{format_duration, parse_duration};
use proto::v1;
use serde_json::{Value, json};

use super::arguments::Stats;
use super::client::{Card, refused, with_card};
use super::output::{columns, json_text, print};

/// Shows statistics, once or until interrupted.
pub(crate) fn run(stats: &Stats) -> Result<()> {
    let interval = parse_duration(&stats.interval).map_err(|message| anyhow!("--interval: {message}"))?;
    if interval.is_zero() {
        return Err(anyhow!("--interval: 0 is too short; write one like \"1s\""));
    }
    with_card(stats.ask.control.as_deref(), async |mut card| {
        let mut before = take(&mut card).await?;
        if !stats.watch {
            return show(stats, &before, None);
        }
        loop {
            tokio::time::sleep(interval).await;
            let now = take(&mut card).await?;
            show(stats, &now, Some(&before))?;
            before = now;
        }
    })
}

async fn take(card: &mut Card) -> Result<v1::Stats> {
    Ok(card.get_stats(v1::GetStatsRequest {}).await.map_err(refused)?.into_inner())
}

/// What one line shows of disks: a queue, or all queues of a function.
#[derive(Clone, Default)]
struct Line {
    function: String,
    queue: Option<u32>,
    reads: u64,
    writes: u64,
    others: u64,
    read_bytes: u64,
    write_bytes: u64,
    errors: u64,
    in_flight: u64,
    held: u64,
    dma_transactions: u64,
    dma_bytes: u64,
    latency: Vec<u64>,
}

impl Line {
    fn add(&mut self, queue: &v1::QueueStats) {
        for kind in &queue.kinds {
            match kind.kind.as_str() {
                "read" => {
                    self.reads += kind.requests;
                    self.read_bytes += kind.bytes;
                }
                "write" => {
                    self.writes += kind.requests;
                    self.write_bytes += kind.bytes;
                }
                _ => self.others += kind.requests,
            }
        }
        self.errors += queue.errors;
        self.in_flight += queue.in_flight;
        self.held += queue.held;
        self.dma_transactions += queue.dma_reads + queue.dma_writes;
        self.dma_bytes += queue.dma_read_bytes + queue.dma_write_bytes;
        self.latency.resize(self.latency.len().max(queue.latency_buckets.len()), 0);
        for (sum, bucket) in self.latency.iter_mut().zip(&queue.latency_buckets) {
            *sum += bucket;
        }
    }

    /// What came since `before`. A function that was deleted and made anew counts from 0 again.
    fn since(&self, before: &Self) -> Self {
        let less = u64::saturating_sub;
        let latency = self.latency.iter().enumerate();
        Self {
            function: self.function.clone(),
            queue: self.queue,
            reads: less(self.reads, before.reads),
            writes: less(self.writes, before.writes),
            others: less(self.others, before.others),
            read_bytes: less(self.read_bytes, before.read_bytes),
            write_bytes: less(self.write_bytes, before.write_bytes),
            errors: less(self.errors, before.errors),
            in_flight: self.in_flight,
            held: self.held,
            dma_transactions: less(self.dma_transactions, before.dma_transactions),
            dma_bytes: less(self.dma_bytes, before.dma_bytes),
            latency: latency.map(|(i, n)| less(*n, before.latency.get(i).copied().unwrap_or(0))).collect(),
        }
    }

    /// An upper bound of the latency that `percent` of the requests kept; `None` without requests, or above all bounds.
    fn latency_us(&self, percent: u64) -> Option<u64> {
        let total: u64 = self.latency.iter().sum();
        let wanted = (total * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (power, count) in self.latency.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return (power + 1 < self.latency.len()).then(|| 1 << power);
            }
        }
        None
    }
}

fn lines(stats: &v1::Stats, each_queue: bool) -> Vec<Line> {
    let mut lines = Vec::new();
    for function in stats.functions.iter().filter(|function| !net::is_net(function)) {
        let mut whole = Line { function: function.name.clone(), ..Line::default() };
        for queue in &function.queues {
            if each_queue {
                let mut line = Line { function: function.name.clone(), queue: Some(queue.index), ..Line::default() };
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
    lines
}

fn show(stats: &Stats, now: &v1::Stats, before: Option<&v1::Stats>) -> Result<()> {
    let seconds = before.map_or(1.0, |before| now.at_ns.saturating_sub(before.at_ns).max(1) as f64 / 1e9);
    let earlier = before.map(|before| lines(before, stats.queues));
    let lines = lines(now, stats.queues).into_iter().map(|line| match &earlier {
        None => line,
        Some(earlier) => {
            let same = earlier.iter().find(|other| other.function == line.function && other.queue == line.queue);
            same.map_or(line.clone(), |before| line.since(before))
        }
    });
    let lines: Vec<Line> = lines.collect();
    let net_lines = net::lines(now, before, stats.queues);
    let rate = |count: u64| (count as f64 / seconds).round() as u64;
    if stats.ask.json {
        let nets = net_lines.iter().map(|line| line.json(&rate));
        let functions: Vec<Value> = lines.iter().map(|line| line_json(line, &rate)).chain(nets).collect();
        let value = json!({ "seconds": before.map(|_| seconds), "functions": functions, "reactors": reactors_json(now, before) });
        // One line each when there are many, so that a reader can tell them apart.
        return print(&if before.is_some() { format!("{value}\n") } else { json_text(&value) });
    }
    let latency = |us: Option<u64>| us.map_or_else(|| "-".to_owned(), |us| format_duration(Duration::from_micros(us)));
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            vec![
                line.function.clone(),
                line.queue.map_or_else(|| "all".to_owned(), |queue| queue.to_string()),
                rate(line.reads).to_string(),
                rate(line.writes).to_string(),
                rate(line.others).to_string(),
                bytes(rate(line.read_bytes)),
                bytes(rate(line.write_bytes)),
                line.errors.to_string(),
                line.in_flight.to_string(),
                line.held.to_string(),
                latency(line.latency_us(50)),
                latency(line.latency_us(99)),
            ]
        })
        .collect();
    let head = [
        "FUNCTION",
        "QUEUE",
        "READS",
        "WRITES",
        "OTHER",
        "READ",
        "WRITTEN",
        "ERRORS",
        "IN-FLIGHT",
        "HELD",
        "P50",
        "P99",
    ];
    // A card that has nothing yet shows what it would show.
    let mut text = if rows.is_empty() && !net_lines.is_empty() { String::new() } else { columns(&head, &rows) };
    if !net_lines.is_empty() {
        text.push_str(&net::table(&net_lines, &rate));
    }
    let reactors: Vec<Vec<String>> = now.reactors.iter().map(|reactor| reactor_row(reactor, before)).collect();
    text.push_str(&columns(&["REACTOR", "BUSY", "QUEUES", "LONGEST-TURN"], &reactors));
    if before.is_some() {
        text.push('\n');
    }
    print(&text)
}

fn line_json(line: &Line, rate: &dyn Fn(u64) -> u64) -> Value {
    json!({
        "function": line.function, "queue": line.queue,
        "reads": rate(line.reads), "writes": rate(line.writes), "others": rate(line.others),
        "read-bytes": rate(line.read_bytes), "write-bytes": rate(line.write_bytes),
        "errors": line.errors, "in-flight": line.in_flight, "held": line.held,
        "dma-transactions": rate(line.dma_transactions), "dma-bytes": rate(line.dma_bytes),
        "p50-us-max": line.latency_us(50), "p99-us-max": line.latency_us(99),
    })
}

/// The share of its time that a reactor was busy, 0 to 1: in the interval, or in its life.
fn busy_share(reactor: &v1::ReactorStats, before: Option<&v1::Stats>) -> f64 {
    let earlier = before.and_then(|before| before.reactors.iter().find(|other| other.index == reactor.index));
    let earlier = earlier.copied().unwrap_or_default();
    let busy = reactor.busy_ns.saturating_sub(earlier.busy_ns) as f64;
    let idle = reactor.idle_ns.saturating_sub(earlier.idle_ns) as f64;
    let asleep = reactor.asleep_ns.saturating_sub(earlier.asleep_ns) as f64;
    let all = busy + idle + asleep;
    if all > 0.0 { busy / all } else { 0.0 }
}

fn reactor_row(reactor: &v1::ReactorStats, before: Option<&v1::Stats>) -> Vec<String> {
    vec![
        reactor.index.to_string(),
        format!("{:.1} %", busy_share(reactor, before) * 100.0),
        reactor.lanes.to_string(),
        format!("{} us", reactor.turn_ns_max / 1000),
    ]
}

fn reactors_json(now: &v1::Stats, before: Option<&v1::Stats>) -> Vec<Value> {
    let reactors = now.reactors.iter().map(|reactor| {
        json!({
            "reactor": reactor.index, "busy-share": busy_share(reactor, before), "queues": reactor.lanes,
            "turn-ns-max": reactor.turn_ns_max, "sleeps": reactor.sleeps,
        })
    });
    reactors.collect()
}

/// Bytes rounded to what a person takes in.
fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} PiB")
}
