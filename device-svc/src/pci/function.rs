//! A whole function's registers: an access to one of its regions goes to the structure that lies there.

use super::config_space::{CONFIG_BYTES, ConfigSpace};
use super::msix::{MsixTable, copy_from};
use super::virtio::{VirtioRegisters, Written};
use super::{Identity, MSIX_BAR, VIRTIO_BAR, layout};

/// The regions of a PCI function that an access can name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Space {
    /// A BAR, by its number, 0 to 5.
    Bar(u8),
    /// The configuration space.
    Config,
}

/// What the registers show that lives outside of them.
pub trait Outside {
    /// The device's own configuration as it is now (virtio 1.3, 4.1.4.6).
    fn device_config(&self) -> Vec<u8>;

    /// The driver writes to the device's own configuration. A write to what is not writable is dropped.
    fn write_device_config(&self, offset: u32, data: &[u8]);

    /// Changes whenever the device's own configuration does.
    fn generation(&self) -> u8;

    /// The ISR status; reading it clears it and takes INTx back (4.1.4.5).
    fn take_isr(&self) -> u8;

    /// Whether INTx is asserted.
    fn intx_pending(&self) -> bool;

    /// Whether a vector's interrupt is pending.
    fn vector_pending(&self, vector: u16) -> bool;
}

/// What a write means beyond the registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// Nothing.
    Nothing,
    /// Which queues run, or may reach memory, may have changed.
    Queues,
    /// Masks, vectors, or INTx may have changed.
    Interrupts,
    /// The driver rings a queue's doorbell.
    Notify(u16),
    /// The driver resets one queue.
    QueueReset(u16),
    /// The driver resets the virtio device; its registers have been.
    DeviceReset,
    /// The whole function is reset (FLR); its registers have been.
    FunctionReset,
}

/// An access that no register answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{length} bytes at {offset:#x} of {space:?} are outside, or not aligned")]
pub struct BadAccess {
    /// What was accessed.
    pub space: Space,
    /// Where.
    pub offset: u64,
    /// How many bytes.
    pub length: usize,
}

/// The registers of one function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PciFunction {
    /// The configuration space.
    pub config: ConfigSpace,
    /// The MSI-X table.
    pub msix: MsixTable,
    /// The common configuration.
    pub virtio: VirtioRegisters,
}

impl PciFunction {
    /// The registers of a function with `queues` queues that offers these features. With `msix` it has a vector for each
    /// queue and one for the configuration; without it has INTx only.
    #[must_use]
    pub fn new(identity: Identity, offered: u64, queues: u16, queue_size_max: u16, msix: bool) -> Self {
        let vectors = if msix { queues + 1 } else { 0 };
        Self {
            config: ConfigSpace::new(identity, vectors),
            msix: MsixTable::new(vectors),
            virtio: VirtioRegisters::new(offered, queues, queue_size_max, vectors),
        }
    }

    /// Bytes of a region; 0 for one that is not there.
    #[must_use]
    pub fn bytes_of(&self, space: Space) -> u64 {
        match space {
            Space::Config => CONFIG_BYTES as u64,
            Space::Bar(VIRTIO_BAR) => layout::VIRTIO_BAR_BYTES.into(),
            Space::Bar(MSIX_BAR) if self.msix.vectors() > 0 => layout::MSIX_BAR_BYTES.into(),
            Space::Bar(_) => 0,
        }
    }

    /// Everything as after power-on: a function-level reset, or a VMM's.
    pub fn reset(&mut self) {
        self.config.reset();
        self.msix.reset();
        self.virtio.reset();
    }

    fn check(&self, space: Space, offset: u64, length: usize) -> Result<(), BadAccess> {
        let end = offset.checked_add(length as u64);
        if length > 0 && end.is_some_and(|end| end <= self.bytes_of(space)) {
            return Ok(());
        }
        Err(BadAccess { space, offset, length })
    }

    /// Reads `data.len()` bytes.
    ///
    /// # Errors
    /// When they are not all inside the region.
    pub fn read(&self, space: Space, offset: u64, data: &mut [u8], outside: &impl Outside) -> Result<(), BadAccess> {
        self.check(space, offset, data.len())?;
        match space {
            Space::Config => {
                self.config.read(offset as usize, data, outside.intx_pending());
                if let Some((bar, at, count)) = self.config.window(offset as usize, data.len()) {
                    let mut window = [0; 4];
                    // Where the window points nowhere, zeroes are read.
                    if self.read(Space::Bar(bar), at, &mut window[..count], outside).is_ok() {
                        copy_from(&window, 0, data);
                    }
                }
            }
            Space::Bar(VIRTIO_BAR) => self.read_virtio(offset, data, outside),
            Space::Bar(_) => self.read_msix(offset, data, outside),
        }
        Ok(())
    }

    fn read_virtio(&self, offset: u64, data: &mut [u8], outside: &impl Outside) {
        data.fill(0);
        let length = data.len();
        if let Some(at) = layout::COMMON.inside(offset, length) {
            self.virtio.read(at, data, outside.generation());
        } else if let Some(at) = layout::DEVICE.inside(offset, length) {
            copy_from(&outside.device_config(), at as usize, data);
        } else if layout::ISR.inside(offset, length) == Some(0) {
            data[0] = outside.take_isr();
        }
    }

    fn read_msix(&self, offset: u64, data: &mut [u8], outside: &impl Outside) {
        data.fill(0);
        if let Some(at) = layout::MSIX_TABLE.inside(offset, data.len()) {
            self.msix.read(at, data);
        } else if let Some(at) = layout::MSIX_PENDING.inside(offset, data.len()) {
            for (byte, place) in (at..).zip(data.iter_mut()) {
                for bit in 0..8 {
                    let vector = (byte * 8 + bit) as u16;
                    *place |= u8::from(vector < self.msix.vectors() && outside.vector_pending(vector)) << bit;
                }
            }
        }
    }

    /// Writes `data`; what is read-only stays as it is.
    ///
    /// # Errors
    /// When it is not all inside the region; in a BAR also when it is not an aligned 1, 2, 4 or 8 bytes.
    pub fn write(
        &mut self,
        space: Space,
        offset: u64,
        data: &[u8],
        outside: &impl Outside,
    ) -> Result<Change, BadAccess> {
        self.check(space, offset, data.len())?;
        if let Space::Bar(_) = space
            && !(matches!(data.len(), 1 | 2 | 4 | 8) && offset.is_multiple_of(data.len() as u64))
        {
            return Err(BadAccess { space, offset, length: data.len() });
        }
        Ok(match space {
            Space::Config => self.write_config(offset as usize, data, outside),
            Space::Bar(VIRTIO_BAR) => self.write_virtio(offset, data, outside),
            Space::Bar(_) => {
                if let Some(at) = layout::MSIX_TABLE.inside(offset, data.len())
                    && data.len() >= 4
                {
                    self.msix.write(at, data);
                }
                Change::Interrupts
            }
        })
    }

    fn write_config(&mut self, offset: usize, data: &[u8], outside: &impl Outside) -> Change {
        if let Some((bar, at, count)) = self.config.window(offset, data.len()) {
            let mut window = [0; 4];
            window[..data.len()].copy_from_slice(data);
            // Where the window points nowhere, the write is dropped.
            return self.write(Space::Bar(bar), at, &window[..count], outside).unwrap_or(Change::Nothing);
        }
        let could = self.config.may_reach_memory();
        if self.config.write(offset, data) {
            self.reset();
            return Change::FunctionReset;
        }
        if could == self.config.may_reach_memory() { Change::Interrupts } else { Change::Queues }
    }

    fn write_virtio(&mut self, offset: u64, data: &[u8], outside: &impl Outside) -> Change {
        let length = data.len();
        if let Some(at) = layout::NOTIFY.inside(offset, length) {
            // The register says which queue; 2 bytes are its number, 4 with NOTIFICATION_DATA also where it stands.
            let queue = at / layout::NOTIFY_BYTES;
            let exists = (queue as usize) < self.virtio.queues().len() && at.is_multiple_of(layout::NOTIFY_BYTES);
            return if exists { Change::Notify(queue as u16) } else { Change::Nothing };
        }
        if let Some(at) = layout::COMMON.inside(offset, length) {
            return match self.virtio.write(at, data) {
                Written::Nothing => Change::Nothing,
                Written::Queues => Change::Queues,
                Written::Vectors => Change::Interrupts,
                Written::QueueReset(queue) => Change::QueueReset(queue),
                Written::Reset => Change::DeviceReset,
            };
        }
        if let Some(at) = layout::DEVICE.inside(offset, length) {
            outside.write_device_config(at, data);
        }
        Change::Nothing
    }

    /// Whether a queue is to run now.
    #[must_use]
    pub fn is_live(&self, queue: u16) -> bool {
        self.virtio.is_live(queue) && self.config.may_reach_memory()
    }
}

#[cfg(test)]
mod tests;
