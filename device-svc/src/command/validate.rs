//! `device-svc validate`: what a configuration file means.

use anyhow::Result;
use device_svc::config::{Config, DeviceConfig, FunctionConfig};
use serde_json::{Value, json};

use super::arguments::Validate;
use super::output::{json_text, print};

/// Loads the file and shows it.
pub(crate) fn run(validate: &Validate) -> Result<()> {
    let config = Config::load(&validate.config)?;
    if validate.json {
        return print(&json_text(&as_json(&config)));
    }
    let mut text = format!("{}: good\n", validate.config.display());
    for volume in &config.volumes {
        let (name, serial) = (&volume.name, volume.serial_text());
        text.push_str(&format!("volume {name}: uuid {}, serial {serial}, {}\n", volume.uuid, volume.backend));
    }
    for uplink in &config.uplinks {
        text.push_str(&format!("uplink {}: {}\n", uplink.name, uplink.backend));
    }
    for function in &config.functions {
        let device = match &function.device {
            DeviceConfig::Blk(blk) => format!("volume {}", blk.volume),
            DeviceConfig::Net(net) => format!("uplink {}, mac {}, mtu {}", net.uplink, net.mac, net.mtu),
        };
        text.push_str(&format!("function {}: {device}, socket {}\n", function.name, function.link.socket.display()));
    }
    print(&text)
}

fn as_json(config: &Config) -> Value {
    let volumes = config.volumes.iter().map(|volume| {
        json!({
            "name": volume.name, "uuid": volume.uuid.to_string(), "serial": volume.serial_text(),
            "backend": volume.backend.to_string(),
        })
    });
    let uplinks =
        config.uplinks.iter().map(|uplink| json!({ "name": uplink.name, "backend": uplink.backend.to_string() }));
    json!({
        "control": config.control.listen.to_string(),
        "volumes": volumes.collect::<Vec<_>>(),
        "uplinks": uplinks.collect::<Vec<_>>(),
        "functions": config.functions.iter().map(function_json).collect::<Vec<_>>(),
    })
}

fn function_json(function: &FunctionConfig) -> Value {
    let (name, link) = (&function.name, function.link.to_string());
    match &function.device {
        DeviceConfig::Blk(blk) => json!({ "name": name, "type": "blk", "volume": blk.volume, "link": link }),
        DeviceConfig::Net(net) => json!({
            "name": name, "type": "net", "uplink": net.uplink, "mac": net.mac.to_string(), "mtu": net.mtu,
            "queue-pairs": net.queue_pairs, "rss": net.rss, "vlan": net.vlan, "link": link,
        }),
    }
}
