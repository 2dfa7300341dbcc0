//! Any text as a configuration: refused in one line that names the place, or taken, and then taken again.
#![no_main]

use std::path::Path;

use device_svc::config::quantity::{format_duration, format_size, parse_duration, parse_size};
use device_svc::config::{Config, DeviceConfig, MacAddress};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match Config::parse(text, "card.toml", Path::new("/etc/dray")) {
        Ok(config) => {
            for function in &config.functions {
                assert!(function.queues() > 0 && function.queue_size > 0);
                match &function.device {
                    DeviceConfig::Blk(blk) => assert!(config.volumes.iter().any(|volume| volume.name == blk.volume)),
                    DeviceConfig::Net(net) => {
                        assert!(config.uplinks.iter().any(|uplink| uplink.name == net.uplink));
                        assert_eq!(MacAddress::new(net.mac.octets()), Some(net.mac));
                    }
                }
            }
        }
        Err(error) => {
            let said = error.to_string();
            assert_eq!(said.lines().count(), 1, "{said:?}");
            assert!(said.contains("card.toml"), "{said:?}");
        }
    }
    if let Ok(bytes) = parse_size(text) {
        assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
    }
    if let Ok(duration) = parse_duration(text) {
        assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
    }
});
