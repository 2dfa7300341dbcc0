use super::*;

const fn address(number: u32) -> Octets {
    let [a, b, c, d] = number.to_be_bytes();
    [2, 0, a, b, c, d]
}

#[test]
fn a_station_is_where_it_was_heard_last_and_not_for_ever() {
    let stations = Stations::new();
    assert_eq!(stations.port_of(address(1), 0, 10), None);
    stations.learn(address(1), 0, 3, 10);
    assert_eq!(stations.port_of(address(1), 0, 10), Some(3));
    assert_eq!(stations.port_of(address(1), 7, 10), None, "in another VLAN it is another station");
    stations.learn(address(1), 0, 4, 11);
    assert_eq!(stations.port_of(address(1), 0, 11), Some(4), "it has moved");
    assert_eq!(stations.port_of(address(1), 0, 11 + AGE_S_MAX), Some(4));
    assert_eq!(stations.port_of(address(1), 0, 12 + AGE_S_MAX), None);
    stations.learn(address(1), 0, 0, 400);
    assert_eq!(stations.port_of(address(1), 0, 400), Some(0), "the uplink's number is a port's");
    stations.learn(address(2), 0, 5, 400);
    stations.forget(0);
    assert_eq!(stations.port_of(address(1), 0, 400), None);
    assert_eq!(stations.port_of(address(2), 0, 400), Some(5));
}

#[test]
fn the_table_is_bounded_and_the_oldest_of_a_set_makes_room() {
    let stations = Stations::new();
    for number in 0..20_000 {
        stations.learn(address(number), 1, 9, number);
    }
    let known = (0..20_000).filter(|number| stations.port_of(address(*number), 1, *number).is_some()).count();
    assert!((SETS..=SETS * WAYS).contains(&known), "{known}");
    assert_eq!(stations.port_of(address(19_999), 1, 19_999), Some(9));
}
