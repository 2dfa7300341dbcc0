//! What is counted of each queue appears once, each way apart.

use super::*;

fn queue(index: u32, name: &str, packets: u64, drops: &[(&str, u64)]) -> v1::QueueStats {
    let drops = drops.iter().map(|(reason, packets)| v1::DropStats { reason: (*reason).to_owned(), packets: *packets });
    let net = v1::NetStats { packets, bytes: packets * 100, drops: drops.collect(), ..v1::NetStats::default() };
    v1::QueueStats { index, name: name.to_owned(), net: Some(net), ..v1::QueueStats::default() }
}

/// A disk, and a network interface of two pairs whose first has carried this much each way.
fn stats(received: u64, sent: u64, without_buffer: u64) -> v1::Stats {
    let queues = vec![
        queue(0, "rx_queue_0", received, &[("no_buffer", without_buffer), ("too_long", 0)]),
        queue(1, "tx_queue_0", sent, &[("no_buffer", 0), ("too_long", 2)]),
        queue(2, "rx_queue_1", 1, &[]),
        queue(3, "tx_queue_1", 2, &[("too_long", 1)]),
        queue(4, "control_queue", 0, &[]),
    ];
    let function =
        |name: &str, kind: &str, queues| v1::FunctionStats { name: name.to_owned(), r#type: kind.to_owned(), queues };
    let functions = vec![function("d", "blk", vec![v1::QueueStats::default()]), function("n", "net", queues)];
    v1::Stats { functions, ..v1::Stats::default() }
}

#[test]
fn totals() {
    let lines = lines(&stats(10, 20, 3), None, false);
    let [line] = &lines[..] else { panic!("one network interface") };
    assert_eq!((line.receive.packets, line.receive.bytes), (11, 1100));
    assert_eq!((line.transmit.packets, line.transmit.bytes), (22, 2200));
    let text = table(&lines, &|count| count);
    let row: Vec<&str> = text.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    assert_eq!(row, ["n", "all", "11", "1.1", "KiB", "22", "2.1", "KiB", "6", "no_buffer", "3,", "too_long", "3"]);
    let value = line.json(&|count| count);
    assert_eq!((&value["function"], &value["type"], &value["queue"]), (&"n".into(), &"net".into(), &Value::Null));
    assert_eq!(value["receive"]["drops"], json!({ "no_buffer": 3 }));
    assert_eq!(value["transmit"]["drops"], json!({ "too_long": 3 }));
}

#[test]
fn each_queue_by_its_name() {
    let lines = lines(&stats(10, 20, 3), None, true);
    let text = table(&lines, &|count| count);
    let names: Vec<&str> = text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!(names, ["rx_queue_0", "tx_queue_0", "rx_queue_1", "tx_queue_1", "control_queue"]);
    assert_eq!(lines[3].json(&|count| count)["queue"], 3);
}

#[test]
fn an_interval_has_what_came_in_it() {
    let lines = lines(&stats(15, 20, 4), Some(&stats(10, 20, 3)), false);
    assert_eq!((lines[0].receive.packets, lines[0].transmit.packets), (5, 0));
    assert_eq!(lines[0].drops().into_iter().collect::<Vec<_>>(), [("no_buffer", 1)]);
    // Made anew since: nothing, rather than less than nothing.
    let lines = super::lines(&stats(2, 1, 0), Some(&stats(10, 20, 3)), false);
    assert_eq!((lines[0].receive.packets, lines[0].transmit.packets), (0, 0));
}
