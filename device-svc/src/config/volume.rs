//! A volume's settings: its name, its identity and where its bytes are.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use uuid::Uuid;

use super::field::{Fault, Field, Reading, Table};
use super::name::{IDENTITY_SPACE, check_name, machine_id};
use super::quantity::format_size;
use super::raw::{RawBackend, RawVolume};

/// Length of the serial that a guest sees (virtio 1.3, 5.2.6: `VIRTIO_BLK_T_GET_ID` answers 20 bytes).
pub const SERIAL_BYTES: usize = 20;

/// How long requests are held while the server is away, unless told otherwise.
pub const IO_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

/// A day: a held request keeps a row of card memory, and a guest has long given up by then.
const IO_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Connections of one NBD volume: each reactor has use for one or two, and servers refuse more than some.
const CONNECTIONS_MAX: u64 = 16;

/// One volume, as configured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeConfig {
    /// Its name on this card: 1 to 63 letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// Its identity. Where none is given it is derived from the name and the place of the bytes, so that it is the same
    /// after every restart.
    pub uuid: Uuid,
    /// What the guest sees as the disk's serial, padded with NULs. See [`serial_of`].
    pub serial: [u8; SERIAL_BYTES],
    /// Where its bytes are.
    pub backend: BackendConfig,
    /// How long requests are held while the server is away, before the guest sees an error.
    pub io_timeout: Duration,
    /// Whether it must not be written.
    pub read_only: bool,
    /// What becomes of requests that were in flight when the service died.
    pub recovery: RecoveryConfig,
}

/// What becomes of a volume's requests that were in flight when the service died, when the next one takes over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecoveryConfig {
    /// They are issued again, in their order, before anything new.
    Reissue,
    /// They end with an I/O error, and are not issued again.
    Fail,
}

impl RecoveryConfig {
    /// As written in the configuration.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Reissue => "reissue",
            Self::Fail => "fail",
        }
    }
}

/// Where a volume's bytes are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BackendConfig {
    /// Nowhere: reads are zeroes, writes are dropped.
    Null {
        /// Size of the volume, bytes; a multiple of 512.
        size_bytes: u64,
    },
    /// In the card's memory; gone with the service.
    Ram {
        /// Size of the volume, bytes; a multiple of 512.
        size_bytes: u64,
    },
    /// In a regular file or block device.
    File {
        /// The file; absolute after loading from a file.
        path: PathBuf,
        /// Make the file with this size (bytes, a multiple of 512) if it is not there.
        create_bytes: Option<u64>,
        /// Past the page cache: `Some(true)` insists, `None` does so where the file system can.
        direct: Option<bool>,
    },
    /// On an NBD server.
    Nbd(NbdConfig),
}

/// How to reach an NBD server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdConfig {
    /// `nbd://host:port/export`, `nbds://…` with TLS, `nbd+unix:///export?socket=/path`, `nbds+unix://…`.
    pub uri: String,
    /// Connections to it; 1 to 16.
    pub connections: u16,
    /// Certificates (PEM) that may have signed the server's.
    pub tls_ca: Option<PathBuf>,
    /// Our certificate and its key (PEM), for a server that asks for one.
    pub tls_identity: Option<TlsIdentity>,
    /// The name that the server's certificate must bear, where it is not the URI's host.
    pub tls_hostname: Option<String>,
}

/// What the card shows to a TLS server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsIdentity {
    /// The certificate chain, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

impl BackendConfig {
    /// The type's name in the configuration.
    #[must_use]
    pub const fn type_name(&self) -> &'static str {
        match self {
            Self::Null { .. } => "null",
            Self::Ram { .. } => "ram",
            Self::File { .. } => "file",
            Self::Nbd(_) => "nbd",
        }
    }

    /// What two volumes must not share unless both only read it; `None` for what nobody else can reach.
    #[must_use]
    pub fn storage(&self) -> Option<String> {
        match self {
            Self::Null { .. } | Self::Ram { .. } => None,
            Self::File { path, .. } => Some(path.display().to_string()),
            Self::Nbd(nbd) => Some(nbd.uri.clone()),
        }
    }
}

/// As an option of a command, which takes it back: `file,path=/srv/root.img,create=10G`.
impl fmt::Display for BackendConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.type_name())?;
        match self {
            Self::Null { size_bytes } | Self::Ram { size_bytes } => write!(f, ",size={}", format_size(*size_bytes)),
            Self::File { path, create_bytes, direct } => {
                write!(f, ",path={}", doubled(path.display()))?;
                if let Some(bytes) = create_bytes {
                    write!(f, ",create={}", format_size(*bytes))?;
                }
                direct.map_or(Ok(()), |direct| write!(f, ",direct={direct}"))
            }
            Self::Nbd(nbd) => {
                write!(f, ",uri={},connections={}", doubled(&nbd.uri), nbd.connections)?;
                if let Some(path) = &nbd.tls_ca {
                    write!(f, ",tls-ca={}", doubled(path.display()))?;
                }
                if let Some(identity) = &nbd.tls_identity {
                    write!(f, ",tls-certificate={}", doubled(identity.certificate.display()))?;
                    write!(f, ",tls-key={}", doubled(identity.key.display()))?;
                }
                nbd.tls_hostname.as_ref().map_or(Ok(()), |name| write!(f, ",tls-hostname={}", doubled(name)))
            }
        }
    }
}

/// A value within a table of options, where a comma is written twice.
pub(super) fn doubled(value: impl fmt::Display) -> String {
    value.to_string().replace(',', ",,")
}

impl VolumeConfig {
    /// The serial as text, without its padding.
    #[must_use]
    pub fn serial_text(&self) -> String {
        self.serial.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect()
    }

    /// The first key in which `other` differs, if any.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<&'static str> {
        [
            ("name", self.name != other.name),
            ("uuid", self.uuid != other.uuid),
            ("serial", self.serial != other.serial),
            ("backend", self.backend != other.backend),
            ("io-timeout", self.io_timeout != other.io_timeout),
            ("read-only", self.read_only != other.read_only),
            ("recovery", self.recovery != other.recovery),
        ]
        .into_iter()
        .find_map(|(key, differs)| differs.then_some(key))
    }

    /// The first key in which `other` differs and that a VM would notice, if any.
    #[must_use]
    pub fn fixed_difference(&self, other: &Self) -> Option<&'static str> {
        let (this, that) = (&self.backend, &other.backend);
        [
            ("uuid", self.uuid != other.uuid),
            ("serial", self.serial != other.serial),
            ("backend", this.type_name() != that.type_name() || this.storage() != that.storage()),
            ("read-only", self.read_only != other.read_only),
        ]
        .into_iter()
        .find_map(|(key, differs)| differs.then_some(key))
    }

    /// Whether this volume can be beside `other` on one card.
    ///
    /// # Errors
    /// The key that stands against it and why.
    pub fn check_beside(&self, other: &Self) -> Result<(), (&'static str, String)> {
        if self.name == other.name {
            return Err(("name", format!("there is already a volume {:?}; choose another name", self.name)));
        }
        if self.uuid == other.uuid {
            return Err(("uuid", format!("volume {:?} has the UUID {} already; give another", other.name, self.uuid)));
        }
        if self.serial == other.serial {
            return Err((
                "serial",
                format!(
                    "volume {:?} has the serial {:?} already; give another `uuid` or `serial`",
                    other.name,
                    self.serial_text()
                ),
            ));
        }
        match self.backend.storage() {
            Some(storage)
                if !(self.read_only && other.read_only) && other.backend.storage().as_ref() == Some(&storage) =>
            {
                Err((
                    "backend",
                    format!(
                        "{storage} is used by volume {:?} already and would be written twice; \
                         set `read-only = true` on both or use one volume",
                        other.name
                    ),
                ))
            }
            _ => Ok(()),
        }
    }
}

/// The serial of a volume without a `serial` of its own: the first 20 hexadecimal digits of its UUID, without hyphens.
///
/// Of all short forms it is the one that an operator recognises beside the UUID. It keeps 74 random bits of a random UUID;
/// volumes of one card are checked against each other all the same.
#[must_use]
pub fn serial_of(uuid: Uuid) -> [u8; SERIAL_BYTES] {
    let mut digits = Uuid::encode_buffer();
    let digits = uuid.simple().encode_lower(&mut digits).as_bytes();
    let mut serial = [0; SERIAL_BYTES];
    serial.copy_from_slice(&digits[..SERIAL_BYTES]);
    serial
}

/// The UUID of a volume that was given none. A volume on a server is the same one from every card; one on this machine
/// is this machine's alone, which `machine` tells apart (`/etc/machine-id`).
fn derived_uuid(name: &str, backend: &BackendConfig, machine: &str) -> Uuid {
    let place = match backend {
        BackendConfig::Nbd(nbd) => format!("nbd {}", nbd.uri),
        BackendConfig::File { path, .. } => format!("{machine} file {}", path.display()),
        BackendConfig::Null { .. } | BackendConfig::Ram { .. } => format!("{machine} {}", backend.type_name()),
    };
    Uuid::new_v5(&IDENTITY_SPACE, format!("{name}\n{place}").as_bytes())
}

pub(super) fn volume(raw: Spanned<RawVolume>, reading: Reading<'_>) -> Result<VolumeConfig, Fault> {
    let span = raw.span();
    let raw = raw.into_inner();
    let mut table = Table { place: "volume".to_owned(), span, reading };
    let name = table.text("name", &raw.name)?;
    let name = table.required("name", name, "`name = \"…\"`")?.to_owned();
    check_name(&name).map_err(|message| table.fault_at("name", &raw.name, message))?;
    table.place = format!("volume {name:?}");

    let backend = table.required("backend", raw.backend, "`backend = { type = \"file\", path = \"…\" }` or another")?;
    let backend = backend_config(&backend, &table.place, reading)?;
    let uuid = match table.text("uuid", &raw.uuid)? {
        Some(text) => Uuid::parse_str(text).ok().filter(|uuid| !uuid.is_nil()).ok_or_else(|| {
            table.fault_at("uuid", &raw.uuid, format_args!("{text:?} is not a UUID; `uuidgen` makes one"))
        })?,
        None => derived_uuid(&name, &backend, &machine_id()),
    };
    let serial = match table.text("serial", &raw.serial)? {
        Some(text) => parse_serial(text).map_err(|message| table.fault_at("serial", &raw.serial, message))?,
        None => serial_of(uuid),
    };
    let io_timeout = table
        .duration("io-timeout", &raw.io_timeout, Duration::from_millis(1)..=IO_TIMEOUT_MAX)?
        .unwrap_or(IO_TIMEOUT_DEFAULT);
    let read_only = table.boolean("read-only", &raw.read_only)?.unwrap_or(false);
    let words = [RecoveryConfig::Reissue, RecoveryConfig::Fail].map(|recovery| (recovery.word(), recovery));
    let recovery = table.word("recovery", &raw.recovery, &words)?.unwrap_or(RecoveryConfig::Reissue);
    Ok(VolumeConfig { name, uuid, serial, backend, io_timeout, read_only, recovery })
}

fn parse_serial(text: &str) -> Result<[u8; SERIAL_BYTES], String> {
    let bytes = text.as_bytes();
    if bytes.is_empty() || bytes.len() > SERIAL_BYTES || !bytes.iter().all(u8::is_ascii_graphic) {
        return Err(format!("{text:?} is not 1 to 20 printable ASCII characters without spaces"));
    }
    let mut serial = [0; SERIAL_BYTES];
    serial[..bytes.len()].copy_from_slice(bytes);
    Ok(serial)
}

fn backend_config(raw: &Spanned<RawBackend>, place: &str, reading: Reading<'_>) -> Result<BackendConfig, Fault> {
    let table = Table { place: format!("{place}: backend"), span: raw.span(), reading };
    let raw = raw.get_ref();
    let words = [("null", "null"), ("ram", "ram"), ("file", "file"), ("nbd", "nbd")];
    let kind = table.word("type", &raw.r#type, &words)?;
    let kind = table.required("type", kind, "`type = \"null\"`, \"ram\", \"file\" or \"nbd\"")?;
    refuse_other_keys(&table, raw, kind)?;
    match kind {
        "null" => Ok(BackendConfig::Null { size_bytes: size(&table, raw)? }),
        "ram" => Ok(BackendConfig::Ram { size_bytes: size(&table, raw)? }),
        "file" => {
            let path = table.path("path", &raw.path)?;
            Ok(BackendConfig::File {
                path: table.required("path", path, "`path = \"…\"`")?,
                create_bytes: whole_sectors(&table, "create", &raw.create)?,
                direct: table.boolean("direct", &raw.direct)?,
            })
        }
        _ => nbd(&table, raw).map(BackendConfig::Nbd),
    }
}

/// Keys that the type at hand has no use for: a mistake that would otherwise pass unseen.
fn refuse_other_keys(table: &Table<'_>, raw: &RawBackend, kind: &str) -> Result<(), Fault> {
    let keys: [(&str, &Field, &[&str]); 10] = [
        ("size", &raw.size, &["null", "ram"]),
        ("path", &raw.path, &["file"]),
        ("create", &raw.create, &["file"]),
        ("direct", &raw.direct, &["file"]),
        ("uri", &raw.uri, &["nbd"]),
        ("connections", &raw.connections, &["nbd"]),
        ("tls-ca", &raw.tls_ca, &["nbd"]),
        ("tls-certificate", &raw.tls_certificate, &["nbd"]),
        ("tls-key", &raw.tls_key, &["nbd"]),
        ("tls-hostname", &raw.tls_hostname, &["nbd"]),
    ];
    for (key, field, kinds) in keys {
        if field.is_some() && !kinds.contains(&kind) {
            let message = format!("not a key of type {kind:?} but of {}; remove it", kinds.join(" and "));
            return Err(table.fault_at(key, field, message));
        }
    }
    Ok(())
}

fn size(table: &Table<'_>, raw: &RawBackend) -> Result<u64, Fault> {
    let size = whole_sectors(table, "size", &raw.size)?;
    table.required("size", size, "`size = \"1G\"`")
}

/// A volume ends on a sector: capacity is counted in 512-byte sectors (virtio 1.3, 5.2.4).
fn whole_sectors(table: &Table<'_>, key: &str, field: &Field) -> Result<Option<u64>, Fault> {
    let size = table.size(key, field)?;
    match size {
        // Half of the address space is left for offset plus length to stay in range.
        Some(size) if size % 512 != 0 || size > i64::MAX as u64 => {
            Err(table.fault_at(key, field, format_args!("{size} is not a multiple of 512 up to 2^63")))
        }
        size => Ok(size),
    }
}

fn nbd(table: &Table<'_>, raw: &RawBackend) -> Result<NbdConfig, Fault> {
    let uri = table.text("uri", &raw.uri)?;
    let uri = table.required("uri", uri, "`uri = \"nbd://host:10809/export\"`")?;
    let schemes = ["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"];
    if !schemes.iter().any(|scheme| uri.starts_with(scheme)) {
        let message = format!("{uri:?} does not start with {}", schemes.join(", "));
        return Err(table.fault_at("uri", &raw.uri, message));
    }
    let tls_ca = table.path("tls-ca", &raw.tls_ca)?;
    let certificate = table.path("tls-certificate", &raw.tls_certificate)?;
    let key = table.path("tls-key", &raw.tls_key)?;
    let tls_identity = match (certificate, key) {
        (Some(certificate), Some(key)) => Some(TlsIdentity { certificate, key }),
        (None, None) => None,
        (Some(_), None) => return Err(table.fault("`tls-certificate` needs its `tls-key` beside it")),
        (None, Some(_)) => return Err(table.fault("`tls-key` needs its `tls-certificate` beside it")),
    };
    let tls_hostname = table.text("tls-hostname", &raw.tls_hostname)?.map(str::to_owned);
    let wants_tls = tls_ca.is_some() || tls_identity.is_some() || tls_hostname.is_some();
    if wants_tls && uri.starts_with("nbd") && !uri.starts_with("nbds") {
        return Err(table.fault_at(
            "uri",
            &raw.uri,
            "the `tls-…` keys need a URI that asks for TLS: nbds:// or nbds+unix://",
        ));
    }
    let connections = table.integer("connections", &raw.connections, 1..=CONNECTIONS_MAX)?.unwrap_or(1);
    Ok(NbdConfig { uri: uri.to_owned(), connections: connections as u16, tls_ca, tls_identity, tls_hostname })
}
