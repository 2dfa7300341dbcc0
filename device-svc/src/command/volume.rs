//! `device-svc volume …`

use anyhow::{Context, Result, anyhow};
use device_svc::config::Options;
use device_svc::config::quantity::parse_size;
use device_svc::control::wire;
use proto::v1;
use serde_json::{Value, json};

use super::arguments::{Ask, VolumeCommand, VolumeCreate};
use super::client::{current_folder, refused, with_card};
use super::output::{backend, columns, json_text, print, size, volume_json, volume_text};

/// Runs one of the commands.
pub(crate) fn run(command: VolumeCommand) -> Result<()> {
    match command {
        VolumeCommand::Create(create) => self::create(*create),
        VolumeCommand::List(ask) => list(&ask),
        VolumeCommand::Info(named) => {
            let request = v1::GetVolumeRequest { name: named.name };
            let volume = with_card(named.ask.control.as_deref(), async |mut card| {
                Ok(card.get_volume(request).await.map_err(refused)?.into_inner())
            })?;
            show(&volume, &named.ask)
        }
        VolumeCommand::Resize(resize) => {
            let size_bytes = parse_size(&resize.size).map_err(|message| anyhow!("SIZE: {message}"))?;
            let request = v1::ResizeVolumeRequest { name: resize.name, size_bytes, shrink: resize.shrink };
            let volume = with_card(resize.ask.control.as_deref(), async |mut card| {
                Ok(card.resize_volume(request).await.map_err(refused)?.into_inner())
            })?;
            if resize.ask.json {
                return print(&json_text(&volume_json(&volume)));
            }
            let name = volume.settings.map(|settings| settings.name).unwrap_or_default();
            print(&format!("volume {name} has {} now\n", size(volume.size_bytes)))
        }
        VolumeCommand::Delete(named) => {
            let request = v1::DeleteVolumeRequest { name: named.name.clone() };
            with_card(named.ask.control.as_deref(), async |mut card| {
                card.delete_volume(request).await.map_err(refused)?;
                Ok(())
            })?;
            if named.ask.json {
                return print(&json_text(&json!({ "deleted": named.name })));
            }
            print(&format!("volume {} deleted\n", named.name))
        }
    }
}

fn create(create: VolumeCreate) -> Result<()> {
    let config = Options::default()
        .with("name", Some(create.name))
        .with("uuid", create.uuid)
        .with("serial", create.serial)
        .with("io-timeout", create.io_timeout)
        .with("read-only", create.read_only)
        .with("recovery", create.recovery)
        .with_typed_table("backend", Some(&create.backend))?
        .volume(&current_folder()?)?;
    let request = v1::CreateVolumeRequest { settings: Some(wire::volume_settings(&config)) };
    let reply = with_card(create.ask.control.as_deref(), async |mut card| {
        Ok(card.create_volume(request).await.map_err(refused)?.into_inner())
    })?;
    let volume = reply.volume.context("the card's answer has no volume; is it of another version?")?;
    if create.ask.json {
        let mut value = volume_json(&volume);
        value["created"] = reply.created.into();
        return print(&json_text(&value));
    }
    let done = if reply.created { "created" } else { "is there already with these settings" };
    let uuid = volume.settings.map(|settings| settings.uuid).unwrap_or_default();
    print(&format!("volume {} {done}: uuid {uuid}, {}\n", config.name, size(volume.size_bytes)))
}

fn show(volume: &v1::Volume, ask: &Ask) -> Result<()> {
    if ask.json {
        return print(&json_text(&volume_json(volume)));
    }
    print(&volume_text(volume))
}

fn list(ask: &Ask) -> Result<()> {
    let volumes = with_card(ask.control.as_deref(), async |mut card| {
        Ok(card.list_volumes(v1::ListVolumesRequest {}).await.map_err(refused)?.into_inner().volumes)
    })?;
    if ask.json {
        return print(&json_text(&Value::Array(volumes.iter().map(volume_json).collect())));
    }
    let rows: Vec<Vec<String>> = volumes
        .into_iter()
        .map(|volume| {
            let settings = volume.settings.unwrap_or_default();
            let access = match volume.read_only {
                _ if !volume.failed.is_empty() => "failed",
                true => "read-only",
                false => "read-write",
            };
            let storage = backend(settings.backend.as_ref()).0;
            let users = volume.functions.join(",");
            vec![settings.name, settings.uuid, size(volume.size_bytes), access.to_owned(), storage, users]
        })
        .collect();
    print(&columns(&["NAME", "UUID", "SIZE", "ACCESS", "BACKEND", "FUNCTIONS"], &rows))
}
