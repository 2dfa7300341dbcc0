//! The two services of the control interface, over the inventory.
//!
//! The inventory blocks, so every call of it leaves the control thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1;
use tonic::{Request, Response, Status};

use super::follow::{Replies, follow};
use super::inventory::{Inventory, InventoryError};
use super::serve::Update;
use super::wire;
use crate::clock::Moment;
use crate::config::ConfigError;

/// What the answer to an update may take to be sent; whatever is left of it is sent while the card stops.
const ANSWER_TIME: Duration = Duration::from_millis(5);

/// What operators may do.
pub struct CardService {
    inventory: Arc<Inventory>,
    started: Instant,
    /// How another program takes over, where there is a keeper.
    update: Option<Arc<Update>>,
}

/// What host-shim may see.
pub struct HostViewService {
    inventory: Arc<Inventory>,
}

impl CardService {
    /// The service over `inventory`; without `update` no other program can take over.
    #[must_use]
    pub fn new(inventory: Arc<Inventory>, update: Option<Update>) -> Self {
        Self { inventory, started: Instant::now(), update: update.map(Arc::new) }
    }
}

impl HostViewService {
    /// The service over `inventory`.
    #[must_use]
    pub const fn new(inventory: Arc<Inventory>) -> Self {
        Self { inventory }
    }
}

impl From<InventoryError> for Status {
    fn from(error: InventoryError) -> Self {
        let message = error.to_string();
        match error {
            InventoryError::Invalid(_) => Self::invalid_argument(message),
            InventoryError::NotFound(_) => Self::not_found(message),
            InventoryError::Exists(_) => Self::already_exists(message),
            InventoryError::Refused(_) => Self::failed_precondition(message),
            InventoryError::Unavailable(_) => Self::unavailable(message),
        }
    }
}

fn invalid(error: ConfigError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// Asks the inventory on a thread that may block.
async fn ask<T: Send + 'static>(
    inventory: &Arc<Inventory>,
    question: impl FnOnce(&Inventory) -> Result<T, Status> + Send + 'static,
) -> Result<Response<T>, Status> {
    let inventory = Arc::clone(inventory);
    let answer = tokio::task::spawn_blocking(move || question(&inventory)).await;
    answer.map_err(|error| Status::internal(format!("the card failed at this request: {error}")))?.map(Response::new)
}

fn set_function(inventory: &Inventory, request: v1::SetFunctionRequest) -> Result<v1::Function, Status> {
    let name = request.name.clone();
    let change = wire::function_change(request, &inventory.function(&name)?.config.device).map_err(invalid)?;
    Ok(wire::function_message(inventory.set_function(&name, &change)?))
}

#[tonic::async_trait]
impl v1::card_server::Card for CardService {
    type FollowEventsStream = Replies;

    async fn get_info(&self, _: Request<v1::GetInfoRequest>) -> Result<Response<v1::CardInfo>, Status> {
        let uptime_ms = self.started.elapsed().as_millis() as u64;
        ask(&self.inventory, move |inventory| {
            Ok(v1::CardInfo {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                instance: inventory.events().instance().to_string(),
                reactors: inventory.reactor_counters().len() as u32,
                volumes: inventory.volumes().len() as u32,
                uplinks: inventory.uplinks().len() as u32,
                functions: inventory.functions().len() as u32,
                uptime_ms,
                pid: std::process::id(),
                program: std::env::current_exe().unwrap_or_default().display().to_string(),
            })
        })
        .await
    }

    async fn update(&self, request: Request<v1::UpdateRequest>) -> Result<Response<v1::UpdateReply>, Status> {
        let Some(update) = self.update.clone() else {
            return Err(Status::failed_precondition(
                "this card runs without a keeper, so no other program can take over; start it without --no-keeper",
            ));
        };
        let program = PathBuf::from(request.into_inner().program);
        if !program.is_absolute() {
            return Err(Status::invalid_argument("the path of the program must be absolute"));
        }
        ask(&self.inventory, move |_| {
            update.tether.update(program).map_err(|error| Status::failed_precondition(error.to_string()))?;
            // Soon, so that this answer is out before the card lets go.
            std::thread::spawn(move || {
                std::thread::sleep(ANSWER_TIME);
                update.stop.send_replace(true);
            });
            Ok(v1::UpdateReply {})
        })
        .await
    }

    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::CreateVolumeReply>, Status> {
        ask(&self.inventory, move |inventory| {
            let settings = request.into_inner().settings.unwrap_or_default();
            let config = wire::volume_config(settings).map_err(invalid)?;
            let name = config.name.clone();
            let created = inventory.create_volume(config)?;
            Ok(v1::CreateVolumeReply { volume: Some(wire::volume_message(inventory.volume(&name)?)), created })
        })
        .await
    }

    async fn list_volumes(&self, _: Request<v1::ListVolumesRequest>) -> Result<Response<v1::ListVolumesReply>, Status> {
        ask(&self.inventory, |inventory| {
            let volumes = inventory.volumes().into_iter().map(wire::volume_message).collect();
            Ok(v1::ListVolumesReply { volumes })
        })
        .await
    }

    async fn get_volume(&self, request: Request<v1::GetVolumeRequest>) -> Result<Response<v1::Volume>, Status> {
        ask(&self.inventory, move |inventory| Ok(wire::volume_message(inventory.volume(&request.get_ref().name)?)))
            .await
    }

    async fn resize_volume(&self, request: Request<v1::ResizeVolumeRequest>) -> Result<Response<v1::Volume>, Status> {
        ask(&self.inventory, move |inventory| {
            let request = request.get_ref();
            Ok(wire::volume_message(inventory.resize_volume(&request.name, request.size_bytes, request.shrink)?))
        })
        .await
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeReply>, Status> {
        ask(&self.inventory, move |inventory| {
            inventory.delete_volume(&request.get_ref().name)?;
            Ok(v1::DeleteVolumeReply {})
        })
        .await
    }

    async fn create_uplink(
        &self,
        request: Request<v1::CreateUplinkRequest>,
    ) -> Result<Response<v1::CreateUplinkReply>, Status> {
        ask(&self.inventory, move |inventory| {
            let settings = request.into_inner().settings.unwrap_or_default();
            let config = wire::uplink_config(settings).map_err(invalid)?;
            let name = config.name.clone();
            let created = inventory.create_uplink(config)?;
            Ok(v1::CreateUplinkReply { uplink: Some(wire::uplink_message(inventory.uplink(&name)?)), created })
        })
        .await
    }

    async fn list_uplinks(&self, _: Request<v1::ListUplinksRequest>) -> Result<Response<v1::ListUplinksReply>, Status> {
        ask(&self.inventory, |inventory| {
            let uplinks = inventory.uplinks().into_iter().map(wire::uplink_message).collect();
            Ok(v1::ListUplinksReply { uplinks })
        })
        .await
    }

    async fn get_uplink(&self, request: Request<v1::GetUplinkRequest>) -> Result<Response<v1::Uplink>, Status> {
        ask(&self.inventory, move |inventory| Ok(wire::uplink_message(inventory.uplink(&request.get_ref().name)?)))
            .await
    }

    async fn delete_uplink(
        &self,
        request: Request<v1::DeleteUplinkRequest>,
    ) -> Result<Response<v1::DeleteUplinkReply>, Status> {
        ask(&self.inventory, move |inventory| {
            inventory.delete_uplink(&request.get_ref().name)?;
            Ok(v1::DeleteUplinkReply {})
        })
        .await
    }

    async fn create_function(
        &self,
        request: Request<v1::CreateFunctionRequest>,
    ) -> Result<Response<v1::CreateFunctionReply>, Status> {
        ask(&self.inventory, move |inventory| {
            let settings = request.into_inner().settings.unwrap_or_default();
            let config = wire::function_config(settings).map_err(invalid)?;
            let name = config.name.clone();
            let created = inventory.create_function(config)?;
            Ok(v1::CreateFunctionReply { function: Some(wire::function_message(inventory.function(&name)?)), created })
        })
        .await
    }

    async fn list_functions(
        &self,
        _: Request<v1::ListFunctionsRequest>,
    ) -> Result<Response<v1::ListFunctionsReply>, Status> {
        ask(&self.inventory, |inventory| {
            let functions = inventory.functions().into_iter().map(wire::function_message).collect();
            Ok(v1::ListFunctionsReply { functions })
        })
        .await
    }

    async fn get_function(&self, request: Request<v1::GetFunctionRequest>) -> Result<Response<v1::Function>, Status> {
        ask(&self.inventory, move |inventory| Ok(wire::function_message(inventory.function(&request.get_ref().name)?)))
            .await
    }

    async fn set_function(&self, request: Request<v1::SetFunctionRequest>) -> Result<Response<v1::Function>, Status> {
        ask(&self.inventory, move |inventory| set_function(inventory, request.into_inner())).await
    }

    async fn set_function_limit(
        &self,
        request: Request<v1::SetFunctionLimitRequest>,
    ) -> Result<Response<v1::Function>, Status> {
        ask(&self.inventory, move |inventory| {
            let v1::SetFunctionLimitRequest { name, limit } = request.into_inner();
            let limit = Some(limit.unwrap_or_default());
            set_function(inventory, v1::SetFunctionRequest { name, limit, ..Default::default() })
        })
        .await
    }

    async fn delete_function(
        &self,
        request: Request<v1::DeleteFunctionRequest>,
    ) -> Result<Response<v1::DeleteFunctionReply>, Status> {
        ask(&self.inventory, move |inventory| {
            inventory.delete_function(&request.get_ref().name)?;
            Ok(v1::DeleteFunctionReply {})
        })
        .await
    }

    async fn get_stats(&self, _: Request<v1::GetStatsRequest>) -> Result<Response<v1::Stats>, Status> {
        ask(&self.inventory, |inventory| {
            let functions = inventory.queue_counters().into_iter().map(wire::function_stats);
            let reactors = inventory.reactor_counters();
            let reactors = reactors.iter().enumerate().map(|(index, reactor)| wire::reactor_stats(index, reactor));
            Ok(v1::Stats { at_ns: Moment::now().0, functions: functions.collect(), reactors: reactors.collect() })
        })
        .await
    }

    async fn follow_events(
        &self,
        request: Request<v1::FollowEventsRequest>,
    ) -> Result<Response<Self::FollowEventsStream>, Status> {
        Ok(Response::new(follow(Arc::clone(self.inventory.events()), request.get_ref())))
    }
}

#[tonic::async_trait]
impl v1::host_view_server::HostView for HostViewService {
    type FollowEventsStream = Replies;

    async fn list_function_views(
        &self,
        _: Request<v1::ListFunctionViewsRequest>,
    ) -> Result<Response<v1::ListFunctionViewsReply>, Status> {
        ask(&self.inventory, |inventory| {
            let events = inventory.events();
            // Before the list: an event may then repeat what the list says already, but none is missed.
            let position = v1::Position { instance: events.instance().to_string(), sequence: events.last() };
            let functions = inventory.functions().into_iter().map(wire::function_view).collect();
            Ok(v1::ListFunctionViewsReply { functions, position: Some(position) })
        })
        .await
    }

    async fn follow_events(
        &self,
        request: Request<v1::FollowEventsRequest>,
    ) -> Result<Response<Self::FollowEventsStream>, Status> {
        Ok(Response::new(follow(Arc::clone(self.inventory.events()), request.get_ref())))
    }
}
