//! Uplinks, and network interfaces on them.

use std::sync::Arc;

use super::*;
use crate::backend::net::Carrier;
use crate::config::{Config, MacAddress, NetChange, NetConfig};
use crate::control::fake::inventory_with;
use crate::control::standing::LinkState;

/// A function like `from`, with another network interface.
fn with_net(from: &FunctionConfig, change: impl FnOnce(&mut NetConfig)) -> FunctionConfig {
    let mut function = from.clone();
    match &mut function.device {
        DeviceConfig::Net(net) => change(net),
        DeviceConfig::Blk(_) => panic!("{from:?} is no network interface"),
    }
    function
}

fn link(inventory: &Inventory, function: &str) -> LinkState {
    match inventory.function(function).unwrap().backing {
        BackingState::Uplink { link } => link,
        BackingState::Volume { uuid, .. } => panic!("{function} is on volume {uuid}"),
    }
}

fn set(inventory: &Inventory, function: &str, change: NetChange) -> Result<FunctionState, InventoryError> {
    inventory.set_function(function, &FunctionChange::Net(change))
}

#[test]
fn a_configuration_starts_and_stops() {
    let (inventory, starter) = inventory();
    inventory.start_all(&config(&["net0", "disk"])).unwrap();
    let names: Vec<String> = inventory.uplinks().into_iter().map(|uplink| uplink.config.name).collect();
    assert_eq!(names, ["any", "one"]);
    let uplink = inventory.uplink("any").unwrap();
    assert_eq!((uplink.functions, uplink.carrier, uplink.info.unwrap().mtu_max), (vec!["net0".to_owned()], true, 1450));
    inventory.stop_all(false);
    assert!(starter.function("net0").stopped.load(Ordering::Relaxed));
    assert!(inventory.uplinks().is_empty());
    let late = inventory.create_uplink(config(&[]).uplinks.remove(0));
    assert_eq!(late, Err(InventoryError::Unavailable("the card is stopping; try again when it is back".to_owned())));
}

#[test]
fn creating_what_exists() {
    let (inventory, _) = inventory();
    let all = config(&["net0"]);
    inventory.start_all(&all).unwrap();
    assert_eq!(inventory.create_uplink(all.uplinks[0].clone()), Ok(false));
    assert_eq!(inventory.create_function(all.functions[0].clone()), Ok(false));
    let advice = "it exists with another value; delete it first, or ask for the settings that it has";
    let other = UplinkConfig { backend: all.uplinks[1].backend.clone(), ..all.uplinks[0].clone() };
    let refused = inventory.create_uplink(other).unwrap_err();
    assert_eq!(refused, InventoryError::Exists(format!("uplink \"any\": `backend`: {advice}")));
    let other = with_net(&all.functions[0], |net| net.queue_pairs = 2);
    let refused = inventory.create_function(other).unwrap_err();
    assert_eq!(refused, InventoryError::Exists(format!("function \"net0\": `queue-pairs`: {advice}")));
    assert_eq!(kinds(&inventory), [("net0".to_owned(), EventKind::Created)]);
}

#[test]
fn a_network_that_refuses_leaves_no_uplink() {
    let (inventory, _) = inventory();
    let tap = "[[uplink]]\nname = \"t\"\nbackend = { type = \"tap\", name = \"dray0\" }\n";
    let tap = Config::parse(tap, "test", std::path::Path::new("/")).unwrap();
    let refused = inventory.start_all(&tap).unwrap_err();
    assert_eq!(refused, InventoryError::Refused("uplink \"t\": the kernel has no taps".to_owned()));
    assert!(inventory.uplinks().is_empty());
}

#[test]
fn what_the_uplink_cannot_do_is_refused() {
    let (inventory, _) = inventory();
    let all = config(&["net0", "net1"]);
    let (first, second) = (&all.functions[0], &all.functions[1]);
    inventory.start_all(&Config { functions: vec![first.clone()], ..all.clone() }).unwrap();
    let refused = |function: FunctionConfig| inventory.create_function(function).unwrap_err();
    assert_eq!(
        refused(with_net(second, |net| net.uplink = "none".to_owned())),
        InventoryError::NotFound("there is no uplink \"none\"; `device-svc uplink list` shows all".to_owned())
    );
    assert_eq!(
        refused(with_net(second, |net| net.mtu = 1500)),
        InventoryError::Invalid(
            "function \"net1\": `mtu`: uplink \"any\" carries no more than 1450 bytes; write `mtu = 1450`".to_owned()
        )
    );
    assert_eq!(
        refused(with_net(second, |net| net.queue_pairs = 5)),
        InventoryError::Invalid(
            "function \"net1\": `queue-pairs`: uplink \"any\" serves no more than 4 of a function; write `queue-pairs = 4`"
                .to_owned()
        )
    );
    let DeviceConfig::Net(NetConfig { mac, .. }) = first.device else { panic!("{first:?}") };
    assert_eq!(
        refused(with_net(second, |net| net.mac = mac)),
        InventoryError::Exists(format!(
            "function \"net1\": `mac`: function \"net0\" has the address {mac} already; give another"
        ))
    );
    assert!(inventory.function("net1").is_err(), "nothing of it is left");
    assert_eq!(inventory.create_function(second.clone()), Ok(true));
}

#[test]
fn an_uplink_serves_as_many_functions_as_it_can() {
    let (inventory, _) = inventory();
    let mut all = config(&["net0", "net1"]);
    for function in &mut all.functions {
        *function = with_net(function, |net| net.uplink = "one".to_owned());
    }
    let refused = inventory.start_all(&all).unwrap_err();
    assert_eq!(
        refused,
        InventoryError::Refused(
            "function \"net1\": `uplink`: uplink \"one\" serves 1 at most, and has function \"net0\"; delete one of them first, or give \
             this one another uplink"
                .to_owned()
        )
    );
    let (inventory, _) = super::inventory();
    inventory.start_all(&Config { functions: Vec::new(), ..all.clone() }).unwrap();
    assert_eq!(inventory.create_function(all.functions[0].clone()), Ok(true));
    inventory.delete_function("net0").unwrap();
    assert_eq!(inventory.create_function(all.functions[1].clone()), Ok(true));
}

#[test]
fn a_used_uplink_is_not_deleted() {
    let (inventory, _) = inventory();
    inventory.start_all(&config(&["net0", "net1"])).unwrap();
    assert_eq!(
        inventory.delete_uplink("any"),
        Err(InventoryError::Refused(
            "uplink \"any\" is used by function \"net0\", function \"net1\"; delete that first".to_owned()
        ))
    );
    inventory.delete_function("net0").unwrap();
    inventory.delete_function("net1").unwrap();
    inventory.delete_uplink("any").unwrap();
    let gone = InventoryError::NotFound("there is no uplink \"any\"; `device-svc uplink list` shows all".to_owned());
    assert_eq!(inventory.delete_uplink("any"), Err(gone));
}

#[test]
fn a_network_interface_changes_while_running_wholly_or_not_at_all() {
    let (inventory, starter) = inventory();
    let all = config(&["net0", "net1", "disk"]);
    inventory.start_all(&all).unwrap();
    let mac = MacAddress::new([2, 0, 0, 0, 0, 9]).unwrap();
    let change = NetChange { mac: Some(mac), mtu: Some(1300), ..NetChange::default() };
    let state = set(&inventory, "net0", change.clone()).unwrap();
    assert_eq!(state.config, with_net(&all.functions[0], |net| (net.mac, net.mtu) = (mac, 1300)));
    assert_eq!(*starter.function("net0").changes.lock().unwrap(), [change]);

    let before = inventory.function("net1").unwrap().config;
    let refused = |change: NetChange| set(&inventory, "net1", change).unwrap_err().to_string();
    let link_down = NetChange { link_up: Some(false), ..NetChange::default() };
    assert_eq!(
        refused(NetChange { mac: Some(mac), ..link_down.clone() }),
        "function \"net1\": `mac`: function \"net0\" has the address 02:00:00:00:00:09 already; give another"
    );
    assert_eq!(
        refused(NetChange { mtu: Some(1451), ..link_down.clone() }),
        "function \"net1\": `mtu`: uplink \"any\" carries no more than 1450 bytes; write `mtu = 1450`"
    );
    assert_eq!(
        refused(NetChange { mtu: Some(1000), ..link_down.clone() }),
        "function \"net1\": its driver holds on to its MTU"
    );
    assert_eq!(inventory.function("net1").unwrap().config, before);
    assert!(starter.function("net1").changes.lock().unwrap().is_empty());
    assert_eq!(link(&inventory, "net1"), LinkState { set_up: true, carrier: true });
    assert!(kinds(&inventory).iter().all(|(_, kind)| *kind == EventKind::Created));

    let error = set(&inventory, "disk", link_down).unwrap_err();
    assert_eq!(error, InventoryError::Invalid("function \"disk\" is of type \"blk\" now; ask again".to_owned()));
    let error = inventory.set_function("net0", &FunctionChange::Blk(LimitConfig::NONE)).unwrap_err();
    assert_eq!(error, InventoryError::Invalid("function \"net0\" is of type \"net\" now; ask again".to_owned()));
}

#[test]
fn the_link_is_up_as_long_as_it_is_set_so_and_there_is_a_carrier() {
    let carrier = Arc::new(Carrier::new(true));
    let (inventory, _) = inventory_with(&carrier);
    inventory.start_all(&config(&["net0"])).unwrap();
    let set_link = |up| set(&inventory, "net0", NetChange { link_up: Some(up), ..NetChange::default() }).unwrap();
    assert_eq!(link(&inventory, "net0"), LinkState { set_up: true, carrier: true });
    carrier.set(false);
    assert_eq!(link(&inventory, "net0"), LinkState { set_up: true, carrier: false });
    set_link(false);
    carrier.set(true);
    set_link(true);
    set_link(true);
    set_link(false);
    carrier.set(false);
    carrier.set(true);
    inventory.delete_function("net0").unwrap();
    carrier.set(false);
    let kinds: Vec<EventKind> = kinds(&inventory).into_iter().map(|(_, kind)| kind).collect();
    assert_eq!(
        kinds,
        [EventKind::Created, EventKind::LinkDown, EventKind::LinkUp, EventKind::LinkDown, EventKind::Deleted],
        "each change of the whole is one event"
    );
}

#[test]
fn a_function_that_is_created_without_a_carrier_says_so() {
    let carrier = Arc::new(Carrier::new(false));
    let (inventory, _) = inventory_with(&carrier);
    inventory.start_all(&config(&["net0"])).unwrap();
    carrier.set(true);
    let kinds: Vec<EventKind> = kinds(&inventory).into_iter().map(|(_, kind)| kind).collect();
    assert_eq!(kinds, [EventKind::Created, EventKind::LinkDown, EventKind::LinkUp]);
}
