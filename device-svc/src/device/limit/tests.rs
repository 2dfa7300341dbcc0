use super::*;

/// How many requests of `bytes` pass in `seconds` when asked every 10 µs.
fn passed(limit: &Limit, way: Way, bytes: u64, from: u64, seconds: u64) -> u64 {
    let mut count = 0;
    let mut now = from;
    while now < from + seconds * 1_000_000_000 {
        while limit.ready(Moment(now), way).is_ok() {
            limit.pay(Moment(now), way, bytes);
            count += 1;
        }
        now += 10_000;
    }
    count
}

#[test]
fn lets_through_the_rate_and_the_burst() {
    let limit = Limit::new(&Rates { iops: 1000, burst: Duration::from_millis(100), ..Rates::default() });
    // 2 s at 1000/s, and the burst of 100 ms once.
    assert_eq!(passed(&limit, Way::Read, 4096, 1_000_000_000, 2), 2100);
    // A long pause gives one burst, not more.
    assert_eq!(passed(&limit, Way::Write, 4096, 100_000_000_000, 1), 1100);
}

#[test]
fn reads_and_writes_are_limited_apart() {
    let limit =
        Limit::new(&Rates { read_bandwidth: 4096 * 500, write_iops: 50, burst: Duration::ZERO, ..Rates::default() });
    let reads = passed(&limit, Way::Read, 4096, 1_000_000_000, 1);
    let writes = passed(&limit, Way::Write, 4096, 1_000_000_000, 1);
    assert_eq!((reads, writes), (500, 50));
}

#[test]
fn no_rates_mean_no_limit_and_rates_can_change() {
    let limit = Limit::new(&Rates::default());
    assert!(!limit.is_limited());
    assert!(limit.ready(Moment(5), Way::Read).is_ok());
    limit.set(&Rates { iops: 1, burst: Duration::ZERO, ..Rates::default() });
    assert!(limit.is_limited());
    limit.pay(Moment(5), Way::Read, 1);
    assert_eq!(limit.ready(Moment(6), Way::Write), Err(Moment(1_000_000_005)));
}
