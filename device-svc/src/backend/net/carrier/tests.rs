//! Who is told, and who is forgotten.

use super::*;

#[derive(Default)]
struct Told(Mutex<Vec<bool>>);

impl CarrierWatcher for Told {
    fn carrier_changed(&self, up: bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(up);
    }
}

fn watched(carrier: &Carrier) -> Arc<Told> {
    let told = Arc::new(Told::default());
    let watcher: Weak<Told> = Arc::downgrade(&told);
    carrier.watch(watcher);
    told
}

#[test]
fn changes_are_told_and_nothing_else() {
    let carrier = Carrier::new(false);
    let told = watched(&carrier);
    for up in [false, true, true, false] {
        carrier.set(up);
    }
    assert_eq!(*told.0.lock().unwrap_or_else(PoisonError::into_inner), [true, false]);
}

#[test]
fn those_that_are_gone_are_not_kept() {
    let carrier = Carrier::new(true);
    for _ in 0..1000 {
        watched(&carrier);
    }
    let kept = || carrier.watchers.lock().unwrap_or_else(PoisonError::into_inner).len();
    assert_eq!(kept(), 1, "each new one takes the place of the last");
    let _told = watched(&carrier);
    carrier.set(false);
    assert_eq!(kept(), 1);
}
