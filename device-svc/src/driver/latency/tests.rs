use super::Latencies;

#[test]
fn a_share_is_known_to_two_percent() {
    for value in [0, 1, 63, 64, 65, 127, 128, 1000, 12_345, 1_000_000, 77_777_777_777] {
        let mut latencies = Latencies::default();
        latencies.record(value);
        let said = latencies.at_share(0.5);
        assert!(said.abs_diff(value) * 50 <= value, "{value} became {said}");
    }
}

#[test]
fn shares_are_ordered() {
    let mut latencies = Latencies::default();
    assert_eq!(latencies.at_share(0.99), 0);
    for value in 1..=1000 {
        latencies.record(value * 10);
    }
    latencies.record(u64::MAX);
    assert_eq!(latencies.count(), 1001);
    assert!(latencies.at_share(0.5).abs_diff(5000) < 100);
    assert!(latencies.at_share(0.99).abs_diff(9910) < 200);
    assert!(latencies.at_share(1.0) > 1 << 39);
}
