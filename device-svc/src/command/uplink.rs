//! `device-svc uplink …`

use anyhow::{Context, Result};
use device_svc::config::Options;
use device_svc::control::wire;
use proto::v1;
use serde_json::{Value, json};

use super::arguments::{Ask, UplinkCommand, UplinkCreate};
use super::client::{refused, with_card};
use super::output::{carrier_name, columns, json_text, network, print, uplink_json, uplink_text};

/// Runs one of the commands.
pub(crate) fn run(command: UplinkCommand) -> Result<()> {
    match command {
        UplinkCommand::Create(create) => self::create(*create),
        UplinkCommand::List(ask) => list(&ask),
        UplinkCommand::Show(named) => {
            let request = v1::GetUplinkRequest { name: named.name };
            let uplink = with_card(named.ask.control.as_deref(), async |mut card| {
                Ok(card.get_uplink(request).await.map_err(refused)?.into_inner())
            })?;
            if named.ask.json {
                return print(&json_text(&uplink_json(&uplink)));
            }
            print(&uplink_text(&uplink))
        }
        UplinkCommand::Delete(named) => {
            let request = v1::DeleteUplinkRequest { name: named.name.clone() };
            with_card(named.ask.control.as_deref(), async |mut card| {
                card.delete_uplink(request).await.map_err(refused)?;
                Ok(())
            })?;
            if named.ask.json {
                return print(&json_text(&json!({ "deleted": named.name })));
            }
            print(&format!("uplink {} deleted\n", named.name))
        }
    }
}

fn create(create: UplinkCreate) -> Result<()> {
    let config = Options::default()
        .with("name", Some(create.name))
        .with_typed_table("backend", Some(&create.backend))?
        .uplink()?;
    let request = v1::CreateUplinkRequest { settings: Some(wire::uplink_settings(&config)) };
    let reply = with_card(create.ask.control.as_deref(), async |mut card| {
        Ok(card.create_uplink(request).await.map_err(refused)?.into_inner())
    })?;
    let uplink = reply.uplink.context("the card's answer has no uplink; is it of another version?")?;
    if create.ask.json {
        let mut value = uplink_json(&uplink);
        value["created"] = reply.created.into();
        return print(&json_text(&value));
    }
    let done = if reply.created { "created" } else { "is there already with these settings" };
    let (carrier, mtu) = (carrier_name(uplink.carrier), uplink.mtu_max);
    print(&format!("uplink {} {done}: {}, {carrier}, mtu up to {mtu}\n", config.name, config.backend))
}

fn list(ask: &Ask) -> Result<()> {
    let uplinks = with_card(ask.control.as_deref(), async |mut card| {
        Ok(card.list_uplinks(v1::ListUplinksRequest {}).await.map_err(refused)?.into_inner().uplinks)
    })?;
    if ask.json {
        return print(&json_text(&Value::Array(uplinks.iter().map(uplink_json).collect())));
    }
    let rows: Vec<Vec<String>> = uplinks
        .into_iter()
        .map(|uplink| {
            let settings = uplink.settings.unwrap_or_default();
            let network = network(settings.backend.as_ref()).0;
            let carrier = match uplink.carrier {
                _ if !uplink.failed.is_empty() => "failed",
                true => "up",
                false => "down",
            };
            let users = uplink.functions.join(",");
            vec![settings.name, carrier.to_owned(), uplink.mtu_max.to_string(), network, users]
        })
        .collect();
    print(&columns(&["NAME", "CARRIER", "MTU-MAX", "BACKEND", "FUNCTIONS"], &rows))
}
