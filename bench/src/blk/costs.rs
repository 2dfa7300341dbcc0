//! What serving costs beside time: DMA transactions, memory, an idle card's CPU, and a neighbour's patience.

use std::time::{Duration, Instant};

use anyhow::Result;
use device_svc::driver::client::{Access, Client, ClientSettings, Load};

use super::Run;
use crate::load::{BlockLoad, connect, p99_beside, settings};
use crate::machine::{cpu_ns, resident_bytes};
use crate::peers::{DrayOptions, Server, dray};
use crate::points::{Values, alternate};
use crate::report::{Goal, Row, Unit};

const NULL: &str = "{ type = \"null\", size = \"1G\" }";

/// Goals: what the medians are held against.
const DIRECT_TRANSACTIONS: f64 = 3.5;
const INDIRECT_TRANSACTIONS: f64 = 4.5;
const FIRST_BYTES: f64 = (64u32 << 20) as f64;
const FURTHER_BYTES: f64 = (1u32 << 20) as f64;
const IDLE_CORE: f64 = 0.01;
const NEIGHBOUR_RATIO: f64 = 4.0;

const FURTHER: usize = 64;

fn alone(name: String, values: Values, unit: Unit, most: f64) -> Row {
    Row { name, values, unit, beside: None, goal: Some(Goal::AtMost(most)) }
}

/// DMA transactions of each 4 KiB read where payload goes through card memory.
pub(super) fn dma(run: &mut Run) -> Result<()> {
    let options =
        DrayOptions { link: run.link, poll: "always", payload: "copy", backends: vec![NULL.to_owned()], keeper: false };
    let server = dray(run.cpus, run.folder.path(), "dma", &options)?;
    for (indirect, word, most) in [(false, "direct", DIRECT_TRANSACTIONS), (true, "indirect", INDIRECT_TRANSACTIONS)] {
        run.say(&format!("DMA transactions of a read, depth 32, {word} chains"));
        let load = BlockLoad { indirect, ..run.reads(32) };
        let mut each = Vec::new();
        for _ in 0..run.pace.alternations {
            let transactions = server.awake(|| {
                let before = server.reads_and_transactions()?;
                load.run(&server.socket(0))?;
                let after = server.reads_and_transactions()?;
                Ok((after.1 - before.1) / (after.0 - before.0))
            })?;
            each.push(transactions);
        }
        run.rows.push(alone(format!("DMA per read, {word}, depth 32"), Values(each), Unit::PerRead, most));
    }
    Ok(())
}

/// A card with `count` functions, each attached, each used a little.
fn attached(run: &Run, name: &str, poll: &str, count: usize) -> Result<(Server, Vec<Client>)> {
    let options = DrayOptions {
        link: run.link,
        poll,
        payload: "in-place",
        backends: vec![NULL.to_owned(); count],
        keeper: false,
    };
    let server = dray(run.cpus, run.folder.path(), name, &options)?;
    server.wake();
    let through = run.link.through();
    let clients = (0..count).map(|number| {
        let mut client = connect(&server.socket(number), ClientSettings { through, ..settings(64) })?;
        let duration = Duration::from_millis(5);
        client.run(&Load { access: Access::Read, span_bytes: 1 << 20, duration, timed: false })?;
        Ok(client)
    });
    let clients = clients.collect::<Result<_>>()?;
    Ok((server, clients))
}

/// Resident memory with one function and with many.
pub(super) fn memory(run: &mut Run) -> Result<()> {
    run.say("resident memory with 1 and 65 functions");
    let resident = |name, count| -> Result<f64> {
        let (server, _clients) = attached(run, name, "adaptive", count)?;
        Ok(resident_bytes(server.id())? as f64)
    };
    let (one, many) = (resident("memory-1", 1)?, resident("memory-65", 1 + FURTHER)?);
    let each = (many - one) / FURTHER as f64;
    run.rows.push(alone("resident, 1 function".into(), Values(vec![one]), Unit::Bytes, FIRST_BYTES));
    run.rows.push(alone("resident, each further function".into(), Values(vec![each]), Unit::Bytes, FURTHER_BYTES));
    Ok(())
}

/// What 64 attached functions cost while nobody asks anything of them.
pub(super) fn idle(run: &mut Run) -> Result<()> {
    run.say("an idle second with 64 functions attached");
    let (server, _clients) = attached(run, "idle", "adaptive", FURTHER)?;
    // Not for an event, but for the absence of any: what was going on has come to rest.
    std::thread::sleep(Duration::from_secs(2));
    let mut shares = Vec::new();
    for _ in 0..3 {
        let (start, before) = (Instant::now(), cpu_ns(server.id())?);
        std::thread::sleep(Duration::from_secs(1));
        shares.push((cpu_ns(server.id())? - before) as f64 / start.elapsed().as_nanos() as f64);
    }
    run.rows.push(alone("idle, 64 functions, of a core".into(), Values(shares), Unit::Core, IDLE_CORE));
    Ok(())
}

/// Depth 1 while a neighbour on the same reactor is flooded, beside depth 1 alone.
pub(super) fn neighbour(run: &mut Run) -> Result<()> {
    run.say("p99 at depth 1 beside a neighbour that is flooded");
    let options = DrayOptions {
        link: run.link,
        poll: "always",
        payload: "in-place",
        backends: vec![NULL.to_owned(); 2],
        keeper: false,
    };
    let server = dray(run.cpus, run.folder.path(), "neighbour", &options)?;
    let through = run.link.through();
    let (quiet, noisy, duration) = (server.socket(0), server.socket(1), run.pace.duration);
    let pairs = alternate(
        run.cpus,
        run.pace.alternations,
        || server.awake(|| p99_beside(through, &quiet, Some(&noisy), duration)),
        || server.awake(|| p99_beside(through, &quiet, None, duration)),
    )?;
    let goal = Some(Goal::AtMost(NEIGHBOUR_RATIO));
    run.add("p99 beside a flood, depth 1".into(), &pairs, "alone", Unit::Nanoseconds, |p99| *p99, goal);
    Ok(())
}
