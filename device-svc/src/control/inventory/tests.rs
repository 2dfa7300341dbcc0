//! Changes happen wholly or not at all, and each is seen.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::Ordering;

mod net;

use super::*;
use crate::config::{BackendConfig, BlkConfig, DeviceConfig, LimitConfig};
use crate::control::events::EventKind;
use crate::control::fake::{config, inventory};
use crate::control::seam::Standing;

/// A function like `from`, with another disk.
fn with_disk(from: &FunctionConfig, change: impl FnOnce(&mut BlkConfig)) -> FunctionConfig {
    let mut function = from.clone();
    match &mut function.device {
        DeviceConfig::Blk(blk) => change(blk),
        DeviceConfig::Net(_) => panic!("{from:?} is no disk"),
    }
    function
}

fn kinds(inventory: &Inventory) -> Vec<(String, EventKind)> {
    inventory.events().after(0).events.into_iter().map(|event| (event.function, event.kind)).collect()
}

#[test]
fn a_configuration_starts_and_stops() {
    let (inventory, starter) = inventory();
    inventory.start_all(&config(&["f", "g"])).unwrap();
    assert_eq!(inventory.functions().len(), 2);
    assert_eq!(starter.function("f").group.as_deref(), Some("gold"));
    assert_eq!(inventory.volume("w").unwrap().functions, ["f", "g"]);
    inventory.stop_all(false);
    assert!(
        starter.function("f").stopped.load(Ordering::Relaxed) && starter.function("g").stopped.load(Ordering::Relaxed)
    );
    assert!(inventory.functions().is_empty() && inventory.volumes().is_empty());
    let late = inventory.create_volume(config(&[]).volumes.remove(0));
    assert_eq!(late, Err(InventoryError::Unavailable("the card is stopping; try again when it is back".to_owned())));
    let deleted: Vec<_> = kinds(&inventory).into_iter().filter(|(_, kind)| *kind == EventKind::Deleted).collect();
    assert_eq!(deleted.len(), 2);
}

#[test]
fn nothing_is_left_half_started() {
    let (inventory, starter) = inventory();
    let error = inventory.start_all(&config(&["f", "refused", "g"])).unwrap_err();
    assert_eq!(error, InventoryError::Refused("function \"refused\": its socket is in use".to_owned()));
    assert!(starter.function("f").stopped.load(Ordering::Relaxed));
    assert!(inventory.functions().is_empty() && inventory.volumes().is_empty());
}

#[test]
fn creating_what_exists() {
    let (inventory, _) = inventory();
    let all = config(&["f"]);
    inventory.start_all(&all).unwrap();
    assert_eq!(inventory.create_volume(all.volumes[0].clone()), Ok(false));
    assert_eq!(inventory.create_function(all.functions[0].clone()), Ok(false));
    let other = VolumeConfig { read_only: true, ..all.volumes[0].clone() };
    let advice = "it exists with another value; delete it first, or ask for the settings that it has";
    assert_eq!(
        inventory.create_volume(other),
        Err(InventoryError::Exists(format!("volume \"v\": `read-only`: {advice}")))
    );
    let other = with_disk(&all.functions[0], |disk| disk.queues = 7);
    assert_eq!(
        inventory.create_function(other),
        Err(InventoryError::Exists(format!("function \"f\": `queues`: {advice}")))
    );
    assert_eq!(kinds(&inventory), [("f".to_owned(), EventKind::Created)]);
}

#[test]
fn what_stands_against_another_is_refused() {
    let (inventory, _) = inventory();
    let all = config(&["f"]);
    inventory.start_all(&all).unwrap();
    let twin = VolumeConfig { name: "x".to_owned(), uuid: uuid::Uuid::from_u128(5), ..all.volumes[0].clone() };
    let error = inventory.create_volume(twin).unwrap_err().to_string();
    assert!(error.starts_with("volume \"x\": `serial`: volume \"v\" has the serial"), "{error}");

    let function = |name: &str, volume: &str| FunctionConfig {
        name: name.to_owned(),
        link: crate::config::LinkConfig {
            socket: format!("/tmp/{name}.sock").into(),
            payload: crate::config::PayloadConfig::Copy,
            ..all.functions[0].link.clone()
        },
        ..with_disk(&all.functions[0], |disk| disk.volume = volume.to_owned())
    };
    assert_eq!(inventory.create_function(function("g", "v")), Ok(true));
    let error = inventory.create_function(function("h", "v")).unwrap_err().to_string();
    assert!(
        error.contains("`volume`: volume \"v\" is used by function \"g\" already and would be written twice"),
        "{error}"
    );
    let error = inventory.create_function(function("h", "x")).unwrap_err();
    assert_eq!(
        error,
        InventoryError::NotFound("there is no volume \"x\"; `device-svc volume list` shows all".to_owned())
    );
    let same_socket = FunctionConfig { name: "h".to_owned(), ..all.functions[0].clone() };
    let error = inventory.create_function(same_socket).unwrap_err().to_string();
    assert_eq!(error, "function \"h\": `link`: function \"f\" has the socket /tmp/f.sock already; choose another");
    let no_group = with_disk(&function("h", "w"), |disk| disk.limit_group = Some("tin".to_owned()));
    let error = inventory.create_function(no_group).unwrap_err().to_string();
    assert_eq!(error, "function \"h\": `limit-group`: there is no limit group \"tin\"");
    let error = inventory.create_function(function("away", "w")).unwrap_err();
    assert_eq!(error, InventoryError::Unavailable("function \"away\": its server is away".to_owned()));
}

#[test]
fn a_used_volume_is_not_deleted() {
    let (inventory, starter) = inventory();
    inventory.start_all(&config(&["f"])).unwrap();
    assert_eq!(
        inventory.delete_volume("w"),
        Err(InventoryError::Refused("volume \"w\" is used by function f; delete that first".to_owned()))
    );
    inventory.delete_function("f").unwrap();
    assert!(starter.function("f").stopped.load(Ordering::Relaxed));
    inventory.delete_volume("w").unwrap();
    let gone = InventoryError::NotFound("there is no volume \"w\"; `device-svc volume list` shows all".to_owned());
    assert_eq!(inventory.delete_volume("w"), Err(gone));
    let gone = InventoryError::NotFound("there is no function \"f\"; `device-svc function list` shows all".to_owned());
    assert_eq!(inventory.delete_function("f"), Err(gone));
}

#[test]
fn resizing_tells_the_functions() {
    let (inventory, starter) = inventory();
    inventory.start_all(&config(&["f"])).unwrap();
    let volume = inventory.resize_volume("w", 4 << 20, false).unwrap();
    assert_eq!(volume.info.unwrap().size_bytes, 4 << 20);
    assert_eq!(volume.config.backend, BackendConfig::Null { size_bytes: 4 << 20 });
    assert_eq!(starter.function("f").resized.load(Ordering::Relaxed), 4 << 20);
    assert_eq!(kinds(&inventory).pop().unwrap().1, EventKind::Resized { size_bytes: 4 << 20 });
    let error = inventory.resize_volume("w", 1 << 20, false).unwrap_err().to_string();
    assert_eq!(
        error,
        "volume \"w\" has 4194304 bytes; making it smaller loses what lies beyond: ask for that with --shrink"
    );
    assert_eq!(inventory.resize_volume("w", 1 << 20, true).unwrap().info.unwrap().size_bytes, 1 << 20);
    let error = inventory.resize_volume("w", 1000, true).unwrap_err().to_string();
    assert_eq!(error, "volume \"w\": a size of 1000 bytes is not a multiple of its 512-byte blocks");
}

#[test]
fn limits_change_while_running() {
    let (inventory, starter) = inventory();
    inventory.start_all(&config(&["f"])).unwrap();
    let limit = LimitConfig { iops: Some(7), ..LimitConfig::NONE };
    let state = inventory.set_function("f", &FunctionChange::Blk(limit.clone())).unwrap();
    assert!(matches!(&state.config.device, DeviceConfig::Blk(disk) if disk.limit == limit), "{state:?}");
    assert_eq!(*starter.function("f").limit.lock().unwrap(), limit);
}

#[test]
fn blocks_must_fit() {
    let (inventory, _) = inventory();
    let mut all = config(&["f"]);
    all.volumes[1].backend = BackendConfig::Null { size_bytes: 512 * 9 };
    all.functions[0] = with_disk(&all.functions[0], |disk| disk.block_bytes = Some(4096));
    let error = inventory.start_all(&all).unwrap_err().to_string();
    assert_eq!(error, "function \"f\": `block-size`: the volume's 4608 bytes are no multiple of 4096; resize it first");
}

#[test]
fn each_change_of_standing_is_one_event_between_creation_and_deletion() {
    let (inventory, starter) = inventory();
    inventory.start_all(&config(&["eager"])).unwrap();
    let function = starter.function("eager");
    function.stand(Standing::Attached { running: 2 });
    let reason = "queue 0: a loop".to_owned();
    function.stand(Standing::NeedsReset { reason: reason.clone() });
    function.stand(Standing::Attached { running: 1 });
    inventory.delete_function("eager").unwrap();
    function.stand(Standing::Attached { running: 1 });
    let kinds: Vec<EventKind> = kinds(&inventory).into_iter().map(|(_, kind)| kind).collect();
    assert_eq!(
        kinds,
        [
            EventKind::Created,
            EventKind::Attached,
            EventKind::NeedsReset { reason },
            EventKind::Recovered,
            EventKind::Detached,
            EventKind::Deleted
        ]
    );
}

#[test]
fn the_log_says_what_it_no_longer_has() {
    let log = EventLog::keeping(4);
    assert_eq!(log.after(0), crate::control::events::Batch { missed: 0, events: Vec::new() });
    for _ in 0..6 {
        log.push("f", None, EventKind::Created);
    }
    let sequences = |after| {
        let batch = log.after(after);
        (batch.missed, batch.events.iter().map(|event| event.sequence).collect::<Vec<_>>())
    };
    assert_eq!(sequences(0), (2, vec![3, 4, 5, 6]));
    assert_eq!(sequences(2), (0, vec![3, 4, 5, 6]));
    assert_eq!(sequences(5), (0, vec![6]));
    assert_eq!(sequences(6), (0, vec![]));
    assert_eq!(sequences(u64::MAX), (0, vec![]));
}
