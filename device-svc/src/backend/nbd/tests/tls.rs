//! `nbds` against the fake server, with certificates made here.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::PrivateKeyDer;

use super::fake::{Fake, Manner};
use super::{Lane, NbdBackend, NbdSettings, pattern};
use crate::backend::nbd::TlsSettings;
use crate::backend::{BackendError, BlockBackend, BlockOperation};

struct Rig {
    fake: Fake,
    folder: tempfile::TempDir,
}

fn rig(asks_for_client: bool) -> Rig {
    let folder = tempfile::tempdir().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(folder.path().join("ca.pem"), authority.pem()).unwrap();
    let issue = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
        (certificate, key)
    };
    let (client, client_key) = issue("client");
    std::fs::write(folder.path().join("client.pem"), client.pem()).unwrap();
    std::fs::write(folder.path().join("client-key.pem"), client_key.serialize_pem()).unwrap();
    let (server, server_key) = issue("storage.example");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = if asks_for_client {
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        builder.with_client_cert_verifier(verifier)
    } else {
        builder.with_no_client_auth()
    };
    let key = PrivateKeyDer::try_from(server_key.serialize_der()).unwrap();
    let config = builder.with_single_cert(vec![server.der().clone()], key).unwrap();
    Rig { fake: Fake::new(Manner { tls: Some(Arc::new(config)), ..Manner::default() }), folder }
}

fn settings(fake: &Fake, folder: &tempfile::TempDir, name: &str, identity: bool) -> NbdSettings {
    let uri = fake.uri().replace("nbd+", "nbds+").parse().unwrap();
    let identity = (folder.path().join("client.pem"), folder.path().join("client-key.pem"), identity);
    let tls = TlsSettings {
        authorities: Some(folder.path().join("ca.pem")),
        identity: identity.2.then_some((identity.0, identity.1)),
        server_name: Some(name.to_owned()),
    };
    NbdSettings { tls: Some(tls), ..NbdSettings::new(uri) }
}

#[test]
fn a_disk_over_tls_survives_a_power_loss() {
    for asks_for_client in [false, true] {
        let rig = rig(asks_for_client);
        let backend = NbdBackend::open(settings(&rig.fake, &rig.folder, "storage.example", asks_for_client)).unwrap();
        let mut lane = Lane::new(backend.open_channel().unwrap(), 8, 1 << 18);
        for slot in 0..4 {
            lane.put(slot, &pattern(slot as u64, 1 << 18));
            lane.start(slot, BlockOperation::Write, (slot as u64) << 18, 1 << 18);
        }
        lane.finish();
        rig.fake.lose_power();
        for slot in 0..4 {
            lane.start(slot + 4, BlockOperation::Read, (slot as u64) << 18, 1 << 18);
        }
        lane.finish();
        for slot in 0..4 {
            assert!(lane.get(slot + 4, 1 << 18) == pattern(slot as u64, 1 << 18), "slot {slot}");
        }
    }
}

#[test]
fn a_stranger_a_missing_certificate_and_a_downgrade_are_refused() {
    let refused = |settings: NbdSettings, reason: &str| match NbdBackend::open(settings) {
        Err(BackendError::Refused(text) | BackendError::Unavailable(text)) => assert!(text.contains(reason), "{text}"),
        Ok(_) => panic!("opened"),
    };
    let trusting = rig(false);
    refused(settings(&trusting.fake, &trusting.folder, "other.example", false), "not valid for name");
    let mut stranger = settings(&trusting.fake, &rig(false).folder, "storage.example", false);
    stranger.tls.as_mut().unwrap().authorities = Some("/nowhere.pem".into());
    refused(stranger, "/nowhere.pem");
    let other = rig(true);
    refused(settings(&trusting.fake, &other.folder, "storage.example", false), "invalid peer certificate");
    refused(settings(&other.fake, &other.folder, "storage.example", false), "");
    let plain = Fake::new(Manner::default());
    refused(settings(&plain, &trusting.folder, "storage.example", false), "declines TLS");
    let mut unencrypted = settings(&plain, &trusting.folder, "storage.example", false);
    unencrypted.uri = plain.uri().parse().unwrap();
    refused(unencrypted, "write nbds");
}
