//! The demo's traffic: a pattern written over the whole volume, read back and compared; then random reads, timed.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::driver::client::{Access, Client, ClientSettings, Load};
use crate::reactor::available_cpus;

/// Bytes of each request while the volume is filled and compared.
const FILL_BYTES: u32 = 64 << 10;
const FILL_DEPTH: u32 = 32;

/// Random reads: how large, at which depths, how long at each.
const READ_BYTES: u32 = 4096;
const DEPTHS: [u32; 2] = [1, 32];
const READ_SECONDS: u32 = 2;

/// How a depth did.
pub(super) struct DepthFigures {
    pub(super) depth: u32,
    pub(super) iops: f64,
    pub(super) median_ns: u64,
    pub(super) p99_ns: u64,
}

/// What was measured.
pub(super) struct Figures {
    pub(super) verified_bytes: u64,
    pub(super) depths: Vec<DepthFigures>,
}

/// Drives the function at `socket`.
pub(super) fn drive(socket: &Path, volume_bytes: u64) -> Result<Figures> {
    let cpus = available_cpus()?;
    // The reactor has the first one.
    let spin = cpus.len() > 1;
    if let Some(id) = cpus.last().filter(|_| spin) {
        core_affinity::set_for_current(core_affinity::CoreId { id: *id });
    }
    let style = ProgressStyle::with_template("{msg:32} [{wide_bar}] {percent:>3} %")?.progress_chars("=> ");
    let bar = ProgressBar::new(2 * volume_bytes).with_style(style.clone());
    let settings = ClientSettings { depth: FILL_DEPTH, request_bytes: FILL_BYTES, spin, ..ClientSettings::default() };
    let mut client = Client::connect(socket, settings)?;
    let capacity_bytes = client.front_end().capacity_bytes()?;
    if capacity_bytes != volume_bytes {
        bail!("the disk has {capacity_bytes} bytes, not {volume_bytes}");
    }
    bar.set_message("writing a pattern");
    pass(&mut client, volume_bytes, Access::Write, &bar)?;
    bar.set_message("reading it back");
    pass(&mut client, volume_bytes, Access::Read, &bar)?;
    client.leave()?;
    bar.finish_and_clear();

    let steps = DEPTHS.len() as u64 * u64::from(READ_SECONDS) * STEPS_EACH_SECOND;
    let bar = ProgressBar::new(steps).with_style(style);
    let mut depths = Vec::new();
    for depth in DEPTHS {
        bar.set_message(format!("random 4 KiB reads, depth {depth}"));
        depths.push(read_at(socket, depth, spin, volume_bytes, &bar)?);
    }
    bar.finish_and_clear();
    Ok(Figures { verified_bytes: volume_bytes, depths })
}

/// How often the bar moves; between, nothing but requests.
const STEPS_EACH_SECOND: u64 = 4;

fn read_at(socket: &Path, depth: u32, spin: bool, volume_bytes: u64, bar: &ProgressBar) -> Result<DepthFigures> {
    let settings = ClientSettings { depth, request_bytes: READ_BYTES, spin, ..ClientSettings::default() };
    let mut client = Client::connect(socket, settings)?;
    let duration = Duration::from_secs(1) / STEPS_EACH_SECOND as u32;
    let load = Load { access: Access::Read, span_bytes: volume_bytes, duration, timed: true };
    let (mut requests, mut seconds) = (0, 0.0);
    let mut latencies = crate::driver::latency::Latencies::default();
    for _ in 0..u64::from(READ_SECONDS) * STEPS_EACH_SECOND {
        let done = client.run(&load)?;
        if done.errors > 0 {
            bail!("{} reads failed", done.errors);
        }
        requests += done.requests;
        seconds += done.seconds;
        latencies.add(&done.latencies);
        bar.inc(1);
    }
    client.leave()?;
    let (median_ns, p99_ns) = (latencies.at_share(0.5), latencies.at_share(0.99));
    Ok(DepthFigures { depth, iops: requests as f64 / seconds, median_ns, p99_ns })
}

/// Writes the pattern over the volume, or reads and compares it.
fn pass(client: &mut Client, volume_bytes: u64, access: Access, bar: &ProgressBar) -> Result<()> {
    let step = u64::from(FILL_BYTES);
    let mut buffer = vec![0; FILL_BYTES as usize];
    let mut found = buffer.clone();
    let mut at = [0; FILL_DEPTH as usize];
    let mut next = 0;
    let mut free: Vec<u32> = (0..FILL_DEPTH).collect();
    let mut left = volume_bytes;
    while left > 0 {
        while next < volume_bytes
            && let Some(row) = free.pop()
        {
            at[row as usize] = next;
            let place = client.queue().data_at(row);
            match access {
                Access::Write => {
                    pattern(next, &mut buffer);
                    client.memory().copy_in(place, &buffer);
                    client.queue().write(row, next / 512, FILL_BYTES);
                }
                Access::Read => {
                    // What was there before must not pass for what was read.
                    buffer.fill(0);
                    client.memory().copy_in(place, &buffer);
                    client.queue().read(row, next / 512, FILL_BYTES);
                }
            }
            next += step;
        }
        client.publish();
        let ended = client.wait()?;
        let offset = at[ended.row as usize];
        if ended.status != 0 {
            bail!("the request at byte {offset} ended with status {}", ended.status);
        }
        if access == Access::Read {
            pattern(offset, &mut buffer);
            let place = client.queue().data_at(ended.row);
            client.memory().copy_out(place, &mut found);
            if let Some(wrong) = buffer.iter().zip(&found).position(|(written, read)| written != read) {
                bail!("byte {} is not what was written", offset + wrong as u64);
            }
        }
        free.push(ended.row);
        left -= step;
        bar.inc(step);
    }
    Ok(())
}

/// Fills `buffer` with what belongs at `offset`: each word says where it is, so that a block in a wrong place is seen.
fn pattern(offset: u64, buffer: &mut [u8]) {
    for (word, place) in (offset / 8..).zip(buffer.as_chunks_mut::<8>().0) {
        // The finaliser of SplitMix64.
        let mut mixed = (word + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        *place = (mixed ^ (mixed >> 27)).to_le_bytes();
    }
}
