//! What the record of requests in flight costs: instructions of each request at depth 32 on the null backend, with it and without.
//!
//! This program runs [one lane and its driver](super::lane) under callgrind, with few requests and with more: what lies between is the
//! requests' alone. The driver does the same with the record as without, so the difference of the two is the record.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Run;
use super::lane::Lane;
use crate::callgrind;
use crate::points::Values;
use crate::report::{Beside, Goal, Row, Unit};

/// Requests in flight.
pub(super) const DEPTH: u32 = 32;
/// What the record should cost a request at most, instructions.
const COST: f64 = 40.0;
/// Requests of the shorter run, and how many more the longer one has.
const FEW: u64 = 2_000;
const MORE: u64 = 20_000;

/// Instructions of a whole run.
fn instructions(folder: &Path, lane: Lane) -> Result<f64> {
    let file = folder.join("lane.count");
    let mut command = Command::new("valgrind");
    command.args(["-q", "--tool=callgrind"]).arg(format!("--callgrind-out-file={}", file.display()));
    command.arg(std::env::current_exe()?).args(["lane", "--requests", &lane.requests.to_string()]);
    for (word, is_set) in [("--packed", lane.packed), ("--indirect", lane.indirect), ("--recorded", lane.recorded)] {
        command.args(is_set.then_some(word));
    }
    let output = command.output()?;
    ensure!(output.status.success(), "valgrind: {}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(&file)?;
    let totals = text.lines().find_map(|line| line.strip_prefix("totals: ")?.parse().ok());
    totals.context("callgrind counts instructions")
}

/// Instructions of each request.
fn of_each(folder: &Path, lane: Lane) -> Result<f64> {
    let few = instructions(folder, Lane { requests: FEW, ..lane })?;
    let more = instructions(folder, Lane { requests: FEW + MORE, ..lane })?;
    Ok((more - few) / MORE as f64)
}

/// Measures both kinds of ring, with requests of three descriptors and with those that lie in a table.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    callgrind::find()?;
    for (ring, packed) in [("split", false), ("packed", true)] {
        for (chains, indirect) in [("three descriptors", false), ("a table", true)] {
            let name = format!("instructions, {ring}, {chains}");
            run.say(&name);
            let side = |recorded| of_each(run.folder.path(), Lane { packed, indirect, recorded, requests: 0 });
            let (off, on) = (side(false)?, side(true)?);
            let beside = Beside {
                name: "no record",
                values: Values(vec![off]),
                ratios: Values(vec![on / off]),
                round_trips: Values(Vec::new()),
                spoiled: 0,
            };
            let row = |name, value, beside, goal| Row {
                name,
                values: Values(vec![value]),
                unit: Unit::PerRequest,
                beside,
                goal,
            };
            run.rows.push(row(name.clone(), on, Some(beside), None));
            run.rows.push(row(format!("{name}: the record"), on - off, None, Some(Goal::AtMost(COST))));
        }
    }
    Ok(())
}
