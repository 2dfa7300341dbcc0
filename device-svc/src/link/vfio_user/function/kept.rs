//! A function as it is kept while no service is there, and how it goes on: its registers as JSON, and files that it writes to without
//! saying so (the record of requests in flight, how often queues were reset, what a network's driver commands).

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::ShownFunction;
use crate::inflight::{AreaShape, RecordArea};
use crate::link::QueuePosition;
use crate::link::vfio_user::lives::Lives;
use crate::pci::{HexBytes, SavedRegisters};
use crate::virtqueue::features;

/// A function as it is kept while no service is there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(in crate::link::vfio_user) struct SavedFunction {
    registers: SavedRegisters,
    generation: u8,
    /// How often each queue had been reset.
    #[serde(default)]
    lives: Vec<u64>,
    #[serde(default)]
    config_writes: BTreeMap<u32, HexBytes>,
}

impl ShownFunction {
    /// Whether there is something to save that was not saved yet; from now on it counts as saved.
    pub(in crate::link::vfio_user) fn take_changed(&self) -> bool {
        self.shown.changed.swap(false, Ordering::AcqRel)
    }

    /// What must be kept so that the driver finds the function as it left it.
    pub(in crate::link::vfio_user) fn save(&self) -> SavedFunction {
        SavedFunction {
            registers: self.shown.lock().save(),
            generation: self.shown.generation.load(Ordering::SeqCst),
            lives: self.lives.as_ref().map(|lives| lives.counts.clone()).unwrap_or_default(),
            config_writes: self.config_writes.borrow().clone(),
        }
    }

    /// Has requests in flight, and what a network's driver commands, recorded in files that outlive the service. Returns them if they are
    /// new.
    pub(in crate::link::vfio_user) fn make_files(&mut self) -> std::io::Result<Vec<File>> {
        if self.record.is_some() {
            return Ok(Vec::new());
        }
        let shape = self.record_shape();
        let mut files = vec![shape.create()?, Lives::create(self.queues.len())?];
        self.lives = Some(Lives::open(files[1].try_clone()?, self.queues.len())?);
        self.record = Some(RecordArea::open(&files[0], 0, shape.bytes(), shape).map_err(std::io::Error::other)?);
        if let Some(network) = self.function.network() {
            let commands = network.make_kept()?;
            network.keep_commands(Some(commands.try_clone()?), 0).map_err(std::io::Error::other)?;
            files.push(commands);
        }
        Ok(files)
    }

    /// A packed ring's record is the larger one, and what the driver will choose is not known before.
    fn record_shape(&self) -> AreaShape {
        AreaShape { queues: self.function.queue_count(), size: self.function.queue_size_max(), packed: true }
    }

    /// Makes the function what it was when it was saved. Its queues run again when their memory is there:
    /// [`come_back`](Self::come_back) must come next.
    pub(in crate::link::vfio_user) fn restore(
        &mut self,
        saved: &SavedFunction,
        mut files: impl Iterator<Item = File>,
    ) -> Result<(), String> {
        let record = files.next().ok_or("the record of requests in flight is missing")?;
        let shape = self.record_shape();
        self.record = Some(RecordArea::open(&record, 0, shape.bytes(), shape).map_err(|error| error.to_string())?);
        let lives = files.next().ok_or("the file of the queues' lives is missing")?;
        self.lives = Some(Lives::open(lives, self.queues.len()).map_err(|error| error.to_string())?);
        self.shown.lock().restore(&saved.registers).map_err(|error| error.to_string())?;
        if let Some(network) = self.function.network() {
            let accepted = self.shown.lock().virtio.accepted();
            network.keep_commands(files.next(), accepted).map_err(|error| error.to_string())?;
        }
        // Another one: the configuration may have changed since.
        self.shown.generation.store(saved.generation.wrapping_add(1), Ordering::SeqCst);
        for (offset, data) in &saved.config_writes {
            self.function.write_config(*offset, &data.0).map_err(|error| error.to_string())?;
        }
        *self.config_writes.borrow_mut() = saved.config_writes.clone();
        let packed = self.shown.lock().virtio.accepted() & features::RING_PACKED != 0;
        for (number, queue) in (0..).zip(&mut self.queues) {
            // Where the two differ, a reset was under way that the VMM was not told of, and which is done again: until then nothing of
            // the queue's is to be trusted.
            let is_whole = self.lives.as_ref().is_some_and(|lives| saved.lives.get(number) == lives.counts.get(number));
            let is_enabled = self.shown.lock().virtio.queues()[number].enabled;
            queue.position = (is_enabled && is_whole).then(|| QueuePosition::fresh(packed));
            queue.is_doubtful = is_enabled && !is_whole;
        }
        self.shown.interrupts.follow(&self.shown.lock());
        // Whatever the service before meant to say, the driver looks at everything once more.
        self.shown.interrupts.raise_all();
        self.take_changed();
        Ok(())
    }
}
