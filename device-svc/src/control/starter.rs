//! Starts functions on the reactors.

use std::sync::Arc;

use super::seam::{FunctionRun, FunctionStarter, Notify, Standing, StartError};
use crate::config::{FunctionConfig, LimitConfig, LimitGroupConfig, ReactorsConfig};
use crate::metrics::{QueueCounters, ReactorCounters};
use crate::volume::Volume;

/// Starts the reactors of `config` and returns what starts functions on them.
///
/// # Errors
/// When the reactors cannot be started.
pub fn start_reactors(_config: &ReactorsConfig) -> Result<Arc<dyn FunctionStarter>, StartError> {
    Ok(Arc::new(Nothing))
}

/// Functions without a data path.
struct Nothing;

struct Waits(Vec<Arc<QueueCounters>>);

impl FunctionStarter for Nothing {
    fn start(
        &self,
        config: &FunctionConfig,
        _group: Option<&LimitGroupConfig>,
        _volume: Arc<Volume>,
        _notify: Notify,
    ) -> Result<Arc<dyn FunctionRun>, StartError> {
        Ok(Arc::new(Waits((0..config.queues).map(|_| Arc::default()).collect())))
    }

    fn reactors(&self) -> Vec<Arc<ReactorCounters>> {
        Vec::new()
    }
}

impl FunctionRun for Waits {
    fn standing(&self) -> Standing {
        Standing::Waiting
    }

    fn counters(&self) -> &[Arc<QueueCounters>] {
        &self.0
    }

    fn resized(&self, _size_bytes: u64) {}

    fn set_limit(&self, _limit: &LimitConfig) {}

    fn stop(&self) {}
}
