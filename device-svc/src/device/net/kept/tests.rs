#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

#[test]
fn the_last_of_each_kind_comes_back_in_order() {
    let file = create().unwrap();
    let mut kept = KeptCommands::open(file.try_clone().unwrap()).unwrap();
    assert!(kept.commands().is_empty());
    let (pairs, rss, hash) = (|pairs| [4, 0, pairs, 0], [4, 1, 9, 9], [4, 2, 8, 8]);
    let (add, delete) = (|vlan| [2, 0, vlan, 0], |vlan| [2, 1, vlan, 0]);
    for command in [pairs(1), rss, add(5), add(6), hash, pairs(2), delete(5), [0, 0, 1, 0]] {
        kept.add(&command).unwrap();
    }
    let again = KeptCommands::open(file.try_clone().unwrap()).unwrap();
    assert_eq!(again.commands(), [rss, add(6), hash, pairs(2), delete(5), [0, 0, 1, 0]]);
    kept.clear().unwrap();
    assert!(KeptCommands::open(file).unwrap().commands().is_empty());
}

#[test]
fn who_dies_before_the_number_is_written_leaves_what_was_before() {
    let file = create().unwrap();
    let mut kept = KeptCommands::open(file.try_clone().unwrap()).unwrap();
    kept.add(&[0, 0, 1]).unwrap();
    kept.add(&[0, 1, 1]).unwrap();
    // The third goes to the other slot.
    file.write_all_at(&[0xff; 100], SLOTS_AT + SLOT_BYTES).unwrap();
    assert_eq!(KeptCommands::open(file).unwrap().commands(), [[0, 0, 1], [0, 1, 1]]);
}

#[test]
fn as_many_as_a_driver_can_give_fit() {
    let mut kept = KeptCommands::open(create().unwrap()).unwrap();
    kept.commands = (0..4095_u16).map(|vlan| [&[2, 0][..], &vlan.to_le_bytes()].concat()).collect();
    kept.commands.push([&[1, 0][..], &[0; 4094]].concat());
    kept.add(&[&[2, 0][..], &4095_u16.to_le_bytes()].concat()).unwrap();
    assert_eq!(KeptCommands::open(kept.file).unwrap().commands().len(), 4097);
}

#[test]
fn another_file_is_refused() {
    let file = create().unwrap();
    file.write_all_at(&[0xff; SLOT_BYTES as usize], SLOTS_AT).unwrap();
    assert!(KeptCommands::open(file.try_clone().unwrap()).is_err());
    file.set_len(10).unwrap();
    assert!(KeptCommands::open(file).is_err());
}
