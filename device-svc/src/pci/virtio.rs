//! The common configuration structure (virtio 1.3, 4.1.4.3) and the rules of device status (2.1, 3.1.1).
//!
//! A driver that breaks a rule gets nothing by it: a status bit that is not its turn stays clear, a queue that was never
//! described stays off, a write to what is read-only is dropped.

use serde::{Deserialize, Serialize};

use super::saved::BadSaved;
use crate::virtqueue::{QUEUE_SIZE_MAX, features};

/// `VIRTIO_MSI_NO_VECTOR`.
pub const NO_VECTOR: u16 = 0xffff;

/// Device status bits (virtio 1.3, 2.1).
pub mod status {
    /// `ACKNOWLEDGE`.
    pub const ACKNOWLEDGE: u8 = 1;
    /// `DRIVER`.
    pub const DRIVER: u8 = 2;
    /// `DRIVER_OK`.
    pub const DRIVER_OK: u8 = 4;
    /// `FEATURES_OK`.
    pub const FEATURES_OK: u8 = 8;
    /// `DEVICE_NEEDS_RESET`.
    pub const NEEDS_RESET: u8 = 64;
    /// `FAILED`.
    pub const FAILED: u8 = 128;
}

/// Where the fields are.
mod at {
    pub(super) const DEVICE_FEATURE_SELECT: u32 = 0x00;
    pub(super) const DEVICE_FEATURE: u32 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u32 = 0x08;
    pub(super) const DRIVER_FEATURE: u32 = 0x0c;
    pub(super) const CONFIG_VECTOR: u32 = 0x10;
    pub(super) const QUEUES: u32 = 0x12;
    pub(super) const STATUS: u32 = 0x14;
    pub(super) const GENERATION: u32 = 0x15;
    pub(super) const QUEUE_SELECT: u32 = 0x16;
    pub(super) const QUEUE_SIZE: u32 = 0x18;
    pub(super) const QUEUE_VECTOR: u32 = 0x1a;
    pub(super) const QUEUE_ENABLE: u32 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFFSET: u32 = 0x1e;
    pub(super) const QUEUE_DESCRIPTORS: u32 = 0x20;
    pub(super) const QUEUE_DRIVER: u32 = 0x28;
    pub(super) const QUEUE_DEVICE: u32 = 0x30;
    pub(super) const QUEUE_NOTIFY_DATA: u32 = 0x38;
    pub(super) const QUEUE_RESET: u32 = 0x3a;
}

/// Bytes of the structure that we have.
const COMMON_BYTES: usize = 0x3c;

/// One queue's registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// Entries.
    pub size: u16,
    /// The MSI-X vector, or [`NO_VECTOR`].
    pub vector: u16,
    /// The driver has enabled it.
    pub enabled: bool,
    /// The descriptor area.
    pub descriptors: u64,
    /// The driver area.
    pub driver: u64,
    /// The device area.
    pub device: u64,
}

/// The registers, for later.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct SavedVirtio {
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    status: u8,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// What a write to the common configuration means beyond its registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Written {
    /// Nothing.
    Nothing,
    /// Which queues run, or what they are, may have changed.
    Queues,
    /// A vector was assigned.
    Vectors,
    /// The driver resets one queue.
    QueueReset(u16),
    /// The driver resets the device; the registers have been.
    Reset,
}

/// The registers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VirtioRegisters {
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    status: u8,
    config_vector: u16,
    queue_select: u16,
    queue_size_max: u16,
    vectors: u16,
    queues: Vec<QueueRegisters>,
}

impl VirtioRegisters {
    /// Registers of `queues` queues of at most `queue_size_max` entries, with `vectors` MSI-X vectors, that offer these
    /// features.
    #[must_use]
    pub fn new(offered: u64, queues: u16, queue_size_max: u16, vectors: u16) -> Self {
        let queue_size_max = queue_size_max.clamp(1, QUEUE_SIZE_MAX);
        let fresh = fresh(queue_size_max);
        Self {
            offered,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            status: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queue_size_max,
            vectors,
            queues: vec![fresh; usize::from(queues)],
        }
    }

    /// Device reset (virtio 1.3, 2.4).
    pub fn reset(&mut self) {
        *self = Self::new(self.offered, self.queues.len() as u16, self.queue_size_max, self.vectors);
    }

    pub(super) fn save(&self) -> SavedVirtio {
        SavedVirtio {
            accepted: self.accepted,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            status: self.status,
            config_vector: self.config_vector,
            queue_select: self.queue_select,
            queues: self.queues.clone(),
        }
    }

    /// After a reset: what was saved holds again, as far as a driver could have brought it about.
    pub(super) fn restore(&mut self, saved: &SavedVirtio) -> Result<(), BadSaved> {
        let packed = saved.accepted & features::RING_PACKED != 0;
        let is_possible = |queue: &QueueRegisters| {
            (1..=self.queue_size_max).contains(&queue.size)
                && (packed || !queue.enabled || queue.size.is_power_of_two())
        };
        if saved.queues.len() != self.queues.len() {
            return Err(BadSaved::Other("queues"));
        }
        if !saved.queues.iter().all(is_possible) {
            return Err(BadSaved::Other("queue sizes"));
        }
        if saved.status & status::FEATURES_OK != 0 && saved.accepted & !self.offered != 0 {
            return Err(BadSaved::Features(saved.accepted & !self.offered));
        }
        let vectors = self.vectors;
        let vector = |vector| if vector < vectors { vector } else { NO_VECTOR };
        self.accepted = saved.accepted;
        self.device_feature_select = saved.device_feature_select;
        self.driver_feature_select = saved.driver_feature_select;
        self.status = saved.status;
        self.config_vector = vector(saved.config_vector);
        self.queue_select = saved.queue_select;
        let queues = saved.queues.iter().map(|queue| QueueRegisters { vector: vector(queue.vector), ..*queue });
        self.queues = queues.collect();
        Ok(())
    }

    /// The features that the driver has written; they hold once FEATURES_OK is set.
    #[must_use]
    pub const fn accepted(&self) -> u64 {
        self.accepted
    }

    /// The device status.
    #[must_use]
    pub const fn status(&self) -> u8 {
        self.status
    }

    /// The device cannot go on; true if the driver was told so just now and must get an interrupt (virtio 1.3, 2.1.2).
    pub const fn need_reset(&mut self) -> bool {
        let first = self.status & status::NEEDS_RESET == 0;
        self.status |= status::NEEDS_RESET;
        first && self.status & status::DRIVER_OK != 0
    }

    /// The vector for configuration changes.
    #[must_use]
    pub const fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The queues.
    #[must_use]
    pub fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// Whether a queue is to run, as far as these registers say.
    #[must_use]
    pub fn is_live(&self, queue: u16) -> bool {
        self.status & status::DRIVER_OK != 0
            && self.status & status::NEEDS_RESET == 0
            && self.queues.get(usize::from(queue)).is_some_and(|queue| queue.enabled)
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// Reads at an offset; behind the end are zeroes. `generation` is that of the device's own configuration.
    pub(super) fn read(&self, offset: u32, data: &mut [u8], generation: u8) {
        let mut bytes = [0; COMMON_BYTES];
        let mut put = |at: u32, value: &[u8]| bytes[at as usize..at as usize + value.len()].copy_from_slice(value);
        let half = |bits: u64, select: u32| match select {
            0 => bits as u32,
            1 => (bits >> 32) as u32,
            _ => 0,
        };
        put(at::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(at::DEVICE_FEATURE, &half(self.offered, self.device_feature_select).to_le_bytes());
        put(at::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(at::DRIVER_FEATURE, &half(self.accepted, self.driver_feature_select).to_le_bytes());
        put(at::CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        put(at::QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(at::STATUS, &[self.status]);
        put(at::GENERATION, &[generation]);
        put(at::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0 (4.1.4.3.1).
        if let Some(queue) = self.selected() {
            put(at::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(at::QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(at::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(at::QUEUE_NOTIFY_OFFSET, &self.queue_select.to_le_bytes());
            put(at::QUEUE_DESCRIPTORS, &queue.descriptors.to_le_bytes());
            put(at::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(at::QUEUE_DEVICE, &queue.device.to_le_bytes());
            put(at::QUEUE_NOTIFY_DATA, &self.queue_select.to_le_bytes());
        }
        super::msix::copy_from(&bytes, offset as usize, data);
    }

    /// Writes a field, or a half of a 64-bit one; whatever else the bytes cover is dropped.
    pub(super) fn write(&mut self, offset: u32, data: &[u8]) -> Written {
        match *data {
            [value] if offset == at::STATUS => self.write_status(value),
            [low, high] => self.write16(offset, u16::from_le_bytes([low, high])),
            [a, b, c, d] => self.write32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if (at::QUEUE_DESCRIPTORS..at::QUEUE_NOTIFY_DATA).contains(&offset) => {
                self.write32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write32(offset + 4, u32::from_le_bytes([e, f, g, h]))
            }
            _ => Written::Nothing,
        }
    }

    fn write_status(&mut self, value: u8) -> Written {
        if value == 0 {
            self.reset();
            return Written::Reset;
        }
        // Bits are only ever added (2.1.1), each in its turn (3.1.1).
        let mut new = self.status | (value & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED));
        if value & status::FEATURES_OK != 0 && new & status::DRIVER != 0 && self.are_features_good() {
            new |= status::FEATURES_OK;
        }
        if value & status::DRIVER_OK != 0 && new & status::FEATURES_OK != 0 {
            new |= status::DRIVER_OK;
        }
        let live = (self.status ^ new) & status::DRIVER_OK != 0;
        self.status = new;
        if live { Written::Queues } else { Written::Nothing }
    }

    const fn are_features_good(&self) -> bool {
        // There is no legacy interface here.
        self.accepted & !self.offered == 0 && self.accepted & features::VERSION_1 != 0
    }

    fn write16(&mut self, offset: u32, value: u16) -> Written {
        let vectors = self.vectors;
        let vector = if value < vectors { value } else { NO_VECTOR };
        match offset {
            at::CONFIG_VECTOR => {
                self.config_vector = vector;
                return Written::Vectors;
            }
            at::QUEUE_SELECT => {
                self.queue_select = value;
                return Written::Nothing;
            }
            _ => {}
        }
        let (size_max, number) = (self.queue_size_max, self.queue_select);
        let (packed, ring_reset) =
            (self.accepted & features::RING_PACKED != 0, self.accepted & features::RING_RESET != 0);
        let ready = self.status & status::FEATURES_OK != 0;
        let Some(queue) = self.queues.get_mut(usize::from(number)) else { return Written::Nothing };
        match offset {
            at::QUEUE_VECTOR => {
                queue.vector = vector;
                Written::Vectors
            }
            at::QUEUE_SIZE if !queue.enabled => {
                if (1..=size_max).contains(&value) && (packed || value.is_power_of_two()) {
                    queue.size = value;
                }
                Written::Nothing
            }
            // A driver never disables a queue by this register (4.1.4.3.2). The size may have been written before the driver made up
            // its mind which ring it wants.
            at::QUEUE_ENABLE if value == 1 && ready && !queue.enabled && (packed || queue.size.is_power_of_two()) => {
                queue.enabled = true;
                Written::Queues
            }
            at::QUEUE_RESET if value == 1 && ring_reset && queue.enabled => {
                *queue = QueueRegisters { vector: queue.vector, ..fresh(size_max) };
                Written::QueueReset(number)
            }
            _ => Written::Nothing,
        }
    }

    fn write32(&mut self, offset: u32, value: u32) -> Written {
        match offset {
            at::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            at::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            at::DRIVER_FEATURE if self.status & status::FEATURES_OK == 0 => match self.driver_feature_select {
                0 => self.accepted = with_half(self.accepted, value, false),
                1 => self.accepted = with_half(self.accepted, value, true),
                _ => {}
            },
            _ => {
                if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select))
                    && !queue.enabled
                {
                    let address = match offset & !4 {
                        at::QUEUE_DESCRIPTORS => &mut queue.descriptors,
                        at::QUEUE_DRIVER => &mut queue.driver,
                        at::QUEUE_DEVICE => &mut queue.device,
                        _ => return Written::Nothing,
                    };
                    *address = with_half(*address, value, offset & 4 != 0);
                }
            }
        }
        Written::Nothing
    }
}

const fn fresh(size: u16) -> QueueRegisters {
    QueueRegisters { size, vector: NO_VECTOR, enabled: false, descriptors: 0, driver: 0, device: 0 }
}

fn with_half(whole: u64, half: u32, upper: bool) -> u64 {
    if upper { (whole & 0xffff_ffff) | u64::from(half) << 32 } else { (whole & !0xffff_ffff) | u64::from(half) }
}

#[cfg(test)]
mod tests;
