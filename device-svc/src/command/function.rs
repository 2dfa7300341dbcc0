//! `device-svc function …`

use anyhow::{Context, Result};
use device_svc::config::Options;
use device_svc::control::wire;
use proto::v1;
use serde_json::{Value, json};

use super::arguments::{Ask, FunctionCommand, FunctionCreate};
use super::client::{current_folder, refused, with_card};
use super::output::{columns, function_json, function_text, json_text, print, size, state_name};

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
        FunctionCommand::SetLimit(set) => {
            let limit = wire::limit_message(&Options::limit(&set.limit)?);
            let request = v1::SetFunctionLimitRequest { name: set.name, limit: Some(limit) };
            let function = with_card(set.ask.control.as_deref(), async |mut card| {
                Ok(card.set_function_limit(request).await.map_err(refused)?.into_inner())
            })?;
            show(&function, &set.ask)
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
        .with("volume", Some(create.volume))
        .with("queues", create.queues)
        .with("queue-size", create.queue_size)
        .with("packed", create.packed)
        .with("seg-max", create.seg_max)
        .with("block-size", create.block_size)
        .with("write-cache", create.write_cache)
        .with("limit-group", create.limit_group)
        .with_typed_table("link", Some(&create.link))?
        .with_table("limit", create.limit.as_deref())?
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
    let socket = function.settings.and_then(|settings| settings.link).map(|link| link.socket).unwrap_or_default();
    print(&format!("function {} {done}: {} at {socket}\n", config.name, size(function.size_bytes)))
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
    let rows: Vec<Vec<String>> = functions
        .into_iter()
        .map(|function| {
            let state = state_name(v1::State::try_from(function.state).unwrap_or_default());
            let settings = function.settings.unwrap_or_default();
            let socket = settings.link.map(|link| link.socket).unwrap_or_default();
            let queues = format!("{}/{}", function.queues_running, settings.queues);
            let size = size(function.size_bytes);
            vec![settings.name, settings.r#type, state.to_owned(), queues, settings.volume, size, socket]
        })
        .collect();
    print(&columns(&["NAME", "TYPE", "STATE", "QUEUES", "VOLUME", "SIZE", "SOCKET"], &rows))
}
