//! `device-svc update`: another program takes over a running card.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use proto::v1;
use serde_json::json;

use super::arguments::UpdateArguments;
use super::client::{Card, refused, with_card};
use super::output::{json_text, print};

/// How long the new program may take from standing by until it serves: longer than one that is started again after a failure does.
const SERVING_TIME_MAX: Duration = Duration::from_secs(60);
/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(20);

/// Has the program take over, and waits until one serves again.
pub(crate) fn run(update: &UpdateArguments) -> Result<()> {
    let program = update.binary.canonicalize().with_context(|| format!("{}", update.binary.display()))?;
    let address = update.ask.control.as_deref();
    let before = with_card(address, async |mut card: Card| info(&mut card).await)?;
    let start = Instant::now();
    let request = v1::UpdateRequest { program: program.display().to_string() };
    with_card(address, async |mut card: Card| card.update(request).await.map_err(refused).map(drop))?;
    let after = loop {
        // Between the two nobody answers.
        match with_card(address, async |mut card: Card| info(&mut card).await) {
            Ok(info) if info.instance != before.instance => break info,
            _ if start.elapsed() > SERVING_TIME_MAX => {
                bail!(
                    "the old program has ended, and none serves after {} s; see the card's log",
                    SERVING_TIME_MAX.as_secs()
                );
            }
            _ => std::thread::sleep(LOOK),
        }
    };
    let took_ms = start.elapsed().as_millis() as u64;
    if after.program != program.display().to_string() {
        bail!("{} did not get to serve, and {} goes on; see the card's log", program.display(), after.program);
    }
    if update.ask.json {
        let was = json!({ "version": before.version, "program": before.program });
        let is = json!({ "version": after.version, "program": after.program, "pid": after.pid });
        return print(&json_text(&json!({ "before": was, "after": is, "took_ms": took_ms })));
    }
    print(&format!("{} {} serves; before it {} {}\n", after.program, after.version, before.program, before.version))
}

async fn info(card: &mut Card) -> Result<v1::CardInfo> {
    Ok(card.get_info(v1::GetInfoRequest {}).await.map_err(refused)?.into_inner())
}
