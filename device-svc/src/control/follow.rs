//! Streams the event log to one follower.

use std::sync::Arc;

use proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::events::{EventLog, News};
use super::wire::event_message;

/// Replies under way to one follower; a slow one then reads from the log's ring, and is told if that outruns it.
const UNDER_WAY: usize = 64;

/// A stream of replies.
pub(super) type Replies = ReceiverStream<Result<v1::FollowEventsReply, Status>>;

/// Starts to follow `log` where the request says. The stream ends with the follower or with the card.
pub(super) fn follow(log: Arc<EventLog>, request: &v1::FollowEventsRequest) -> Replies {
    let (sender, receiver) = mpsc::channel(UNDER_WAY);
    let after = request.after.clone();
    tokio::spawn(async move {
        // Errs when the follower is gone, which is how following ends.
        let _ = stream(&log, after, &sender).await;
    });
    ReceiverStream::new(receiver)
}

type Sender = mpsc::Sender<Result<v1::FollowEventsReply, Status>>;

async fn stream(log: &EventLog, after: Option<v1::Position>, sender: &Sender) -> Result<(), Gone> {
    let mut news = log.news();
    let instance = log.instance().to_string();
    let position = |sequence| v1::Position { instance: instance.clone(), sequence };
    let last = log.last();
    let mut at = match &after {
        None => last,
        Some(after) if after.instance == instance => after.sequence.min(last),
        // Of another instance: all of this one's is new, and what was before cannot be counted.
        Some(_) => 0,
    };
    send(sender, v1::follow_events_reply::Item::Position(position(at))).await?;
    if after.is_some_and(|after| after.instance != instance) {
        send(sender, missed(0, position(at))).await?;
    }
    loop {
        // Seen before reading, so that an event between reading and waiting wakes the wait.
        let News { last, closed } = *news.borrow_and_update();
        if last > at {
            let batch = log.after(at);
            if batch.missed > 0 {
                at += batch.missed;
                send(sender, missed(batch.missed, position(at))).await?;
            }
            for event in batch.events {
                at = event.sequence;
                send(sender, v1::follow_events_reply::Item::Event(event_message(event))).await?;
            }
            continue;
        }
        if closed {
            return Ok(());
        }
        tokio::select! {
            changed = news.changed() => changed.map_err(|_| Gone)?,
            () = sender.closed() => return Err(Gone),
        }
    }
}

/// The follower is gone.
struct Gone;

async fn send(sender: &Sender, item: v1::follow_events_reply::Item) -> Result<(), Gone> {
    sender.send(Ok(v1::FollowEventsReply { item: Some(item) })).await.map_err(|_| Gone)
}

const fn missed(events: u64, position: v1::Position) -> v1::follow_events_reply::Item {
    v1::follow_events_reply::Item::Missed(v1::Missed { events, position: Some(position) })
}
