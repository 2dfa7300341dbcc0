//! Death at any store, for tests: every store to memory that outlives the process is announced here, and the one that was asked
//! for does not happen, nor does anything after it.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    /// Stores until death; `None`: this thread lives.
    static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// The process has died.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Died;

/// A store to shared memory comes next, of at most 64 bits.
pub fn about_to_store() {
    match LEFT.get() {
        None => {}
        Some(0) => {
            LEFT.set(None);
            // Not a panic: nothing is reported, the stack is unwound.
            resume_unwind(Box::new(Died));
        }
        Some(left) => LEFT.set(Some(left - 1)),
    }
}

/// Does `work`, and dies in it after so many `stores`, if it makes more.
///
/// # Errors
/// When it died; what `work` had borrowed is in whatever state that left.
pub fn live_for<T>(stores: u64, work: impl FnOnce() -> T) -> Result<T, Died> {
    LEFT.set(Some(stores));
    let done = catch_unwind(AssertUnwindSafe(work));
    LEFT.set(None);
    done.map_err(|panic| match panic.downcast::<Died>() {
        Ok(died) => *died,
        Err(panic) => resume_unwind(panic),
    })
}
