//! `device-svc function …`

use anyhow::{Context, Result};
use device_svc::config::{DeviceConfig, NetChange, Options};
use device_svc::control::wire;
use proto::v1;
use serde_json::{Value, json};

use super::arguments::{Ask, FunctionCommand, FunctionCreate, FunctionSet, FunctionSetLimit, LinkArgument};
use super::client::{current_folder, refused, with_card};
use super::output::{columns, function_json, function_text, is_up, json_text, print, size, state_name};

/// Runs one of the commands.
pub(crate) fn run(command: FunctionCommand) -> Result<()> {
    match command {
        FunctionCommand::Create(create) => self::create(*create),
        FunctionCommand::List(ask) => list(&ask),
        FunctionCommand::Show(named) => {
            let request = v1::GetFunctionRequest { name: named.name };
            let function = with_card(named.ask.control.as_deref(), async |mut card| {
                Ok(card.get_function(request).await.map_err(refused)?.into_inner())
            })?;
            show(&function, &named.ask)
        }
        FunctionCommand::Set(set) => self::set(set),
        FunctionCommand::SetLimit(FunctionSetLimit { name, limit, ask }) => {
            set(FunctionSet { name, link: None, mac: None, mtu: None, limit: Some(limit), ask })
        }
        FunctionCommand::Delete(named) => {
            let request = v1::DeleteFunctionRequest { name: named.name.clone() };
            with_card(named.ask.control.as_deref(), async |mut card| {
                card.delete_function(request).await.map_err(refused)?;
                Ok(())
            })?;
            if named.ask.json {
                return print(&json_text(&json!({ "deleted": named.name })));
            }
            print(&format!("function {} deleted\n", named.name))
        }
    }
}

fn create(create: FunctionCreate) -> Result<()> {
    let config = Options::default()
        .with("name", Some(create.name))
        .with("type", Some(create.r#type))
        .with("volume", create.volume)
        .with("queues", create.queues)
        .with("queue-size", create.queue_size)
        .with("packed", create.packed)
        .with("seg-max", create.seg_max)
        .with("block-size", create.block_size)
        .with("write-cache", create.write_cache)
        .with("limit-group", create.limit_group)
        .with("uplink", create.uplink)
        .with("mac", create.mac)
        .with("mtu", create.mtu)
        .with("queue-pairs", create.queue_pairs)
        .with("rss", create.rss)
        .with("vlan", create.vlan)
        .with_table("anti-spoofing", create.anti_spoofing.as_deref())?
        .with_typed_table("link", Some(&create.link))?
        .with_limit(create.limit.as_deref())?
        .function(&current_folder()?)?;
    let request = v1::CreateFunctionRequest { settings: Some(wire::function_settings(&config)) };
    let reply = with_card(create.ask.control.as_deref(), async |mut card| {
        Ok(card.create_function(request).await.map_err(refused)?.into_inner())
    })?;
    let function = reply.function.context("the card's answer has no function; is it of another version?")?;
    if create.ask.json {
        let mut value = function_json(&function);
        value["created"] = reply.created.into();
        return print(&json_text(&value));
    }
    let done = if reply.created { "created" } else { "is there already with these settings" };
    let settings = function.settings.unwrap_or_default();
    let socket = settings.link.map(|link| link.socket).unwrap_or_default();
    let device = match config.device {
        DeviceConfig::Blk(_) => size(function.size_bytes),
        DeviceConfig::Net(_) => settings.mac,
    };
    print(&format!("function {} {done}: {device} at {socket}\n", config.name))
}

/// What can be set depends on the function's type, which the card knows.
fn set(set: FunctionSet) -> Result<()> {
    let FunctionSet { name, link, mac, mtu, limit, ask } = set;
    let options =
        Options::default().with("name", Some(&name)).with("mac", mac).with("mtu", mtu).with_limit(limit.as_deref())?;
    let link_up = link.map(|link| link == LinkArgument::Up);
    let function = with_card(ask.control.as_deref(), async |mut card| {
        let get = v1::GetFunctionRequest { name: name.clone() };
        let function = card.get_function(get).await.map_err(refused)?.into_inner();
        let request = match function.settings.unwrap_or_default().r#type.as_str() {
            "net" => {
                let NetChange { mac, mtu, limit, .. } = options.net_change()?;
                let (mac, limit) = (mac.map(|mac| mac.to_string()), limit.as_ref().map(wire::net_limit_message));
                v1::SetFunctionRequest { name, limit, link_up, mac, mtu: mtu.map(u32::from) }
            }
            _ => {
                // A disk's link cannot be set: the card says so.
                let limit = match link_up {
                    None => Some(wire::limit_message(&options.blk_change()?)),
                    Some(_) => None,
                };
                v1::SetFunctionRequest { name, limit, link_up, mac: None, mtu: None }
            }
        };
        Ok(card.set_function(request).await.map_err(refused)?.into_inner())
    })?;
    show(&function, &ask)
}

fn show(function: &v1::Function, ask: &Ask) -> Result<()> {
    if ask.json {
        return print(&json_text(&function_json(function)));
    }
    print(&function_text(function))
}

fn list(ask: &Ask) -> Result<()> {
    let functions = with_card(ask.control.as_deref(), async |mut card| {
        Ok(card.list_functions(v1::ListFunctionsRequest {}).await.map_err(refused)?.into_inner().functions)
    })?;
    if ask.json {
        return print(&json_text(&Value::Array(functions.iter().map(function_json).collect())));
    }
    let rows: Vec<Vec<String>> = functions.into_iter().map(row).collect();
    let head = ["NAME", "TYPE", "STATE", "QUEUES", "VOLUME", "SIZE", "UPLINK", "LINK", "MAC", "SOCKET"];
    print(&columns(&head, &rows))
}

fn row(function: v1::Function) -> Vec<String> {
    let state = state_name(v1::State::try_from(function.state).unwrap_or_default()).to_owned();
    let settings = function.settings.unwrap_or_default();
    let socket = settings.link.map(|link| link.socket).unwrap_or_default();
    let none = || "-".to_owned();
    let [volume, size, uplink, link, mac] = match &function.link_state {
        None => [settings.volume, size(function.size_bytes), none(), none(), none()],
        Some(link) => {
            let link = if is_up(link) { "up" } else { "down" };
            [none(), none(), settings.uplink, link.to_owned(), settings.mac]
        }
    };
    let queues = format!("{}/{}", function.queues_running, function.queues);
    vec![settings.name, settings.r#type, state, queues, volume, size, uplink, link, mac, socket]
}
