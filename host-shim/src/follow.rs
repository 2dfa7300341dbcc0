//! Follows the card's events over any number of its restarts, and says what it missed.

use std::time::Duration;

use anyhow::Result;
use proto::v1::follow_events_reply::Item;
use proto::v1::{FollowEventsRequest, ListFunctionViewsRequest, Position};

use crate::output;
use crate::{Card, connect};

/// Between tries to reach a card that is away: soon enough for a restart, seldom enough to cost nothing.
const RETRY_EVERY: Duration = Duration::from_millis(500);

/// Why following stopped for now.
enum Interruption {
    /// The card went away.
    Away(String),
    /// Events were missed: the functions must be listed anew.
    Missed,
    /// Nothing can be written any more.
    Output(anyhow::Error),
}

/// Follows until interrupted. A card that is away at the start is an error; one that goes away later is waited for.
pub(crate) async fn follow(socket: &str, json: bool) -> Result<()> {
    let mut card = connect(socket).await?;
    let mut after = None;
    loop {
        match follow_once(&mut card, &mut after, json).await {
            Interruption::Output(error) => return Err(error),
            Interruption::Missed => after = None,
            Interruption::Away(reason) => {
                output::print(&output::note("away", &format!("the card is away ({reason}); waiting for it"), json))?;
                card = reconnect(socket).await;
                output::print(&output::note("back", "the card is back", json))?;
            }
        }
    }
}

async fn reconnect(socket: &str) -> Card {
    loop {
        match connect(socket).await {
            Ok(card) => return card,
            Err(_) => tokio::time::sleep(RETRY_EVERY).await,
        }
    }
}

/// Lists the functions if there is no position to go on from, then follows; never returns without a reason.
async fn follow_once(card: &mut Card, after: &mut Option<Position>, json: bool) -> Interruption {
    let away = |status: tonic::Status| Interruption::Away(status.message().to_owned());
    if after.is_none() {
        let list = match card.list_function_views(ListFunctionViewsRequest {}).await {
            Ok(reply) => reply.into_inner(),
            Err(status) => return away(status),
        };
        for function in &list.functions {
            if let Err(error) = output::print(&output::present(function, json)) {
                return Interruption::Output(error);
            }
        }
        *after = list.position;
    }
    let request = FollowEventsRequest { after: after.clone() };
    let mut events = match card.follow_events(request).await {
        Ok(reply) => reply.into_inner(),
        Err(status) => return away(status),
    };
    loop {
        let item = match events.message().await {
            Ok(Some(reply)) => reply.item,
            Ok(None) => return Interruption::Away("it ended".to_owned()),
            Err(status) => return away(status),
        };
        let text = match &item {
            Some(Item::Event(event)) => {
                if let Some(position) = after.as_mut() {
                    position.sequence = event.sequence;
                }
                output::event(event, json)
            }
            Some(Item::Missed(missed)) => output::missed(missed, json),
            Some(Item::Position(_)) | None => continue,
        };
        if let Err(error) = output::print(&text) {
            return Interruption::Output(error);
        }
        if matches!(item, Some(Item::Missed(_))) {
            return Interruption::Missed;
        }
    }
}
