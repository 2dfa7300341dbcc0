#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write;
use std::sync::Arc;

use super::*;

struct Bed {
    wire: Arc<Wire>,
    peer: Framing,
}

fn bed() -> Bed {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = Framing::new(theirs, BODY_BYTES_MAX, DESCRIPTORS_MAX);
    Bed { wire: Arc::new(Wire::new(ours, false).unwrap()), peer }
}

fn hear(peer: &mut Framing) -> Message {
    let mut message = Message::default();
    peer.receive(&mut message).unwrap();
    message
}

fn answer(peer: &Framing, to: &Message, data: &[u8]) {
    let access = &to.body[..size_of::<DmaAccess>()];
    peer.send(Header { flags: TYPE_REPLY, ..to.header }, &[access, data], &[]).unwrap();
}

fn ask(wire: &Wire, question: Question<'_>) -> u16 {
    wire.ask(Iova(0x1000), question).unwrap().unwrap()
}

fn settled(wire: &Wire, id: u16, count: u32) -> Result<Vec<u8>, DmaFault> {
    loop {
        if let Some(bytes) = wire.answer(id, count)? {
            return Ok(bytes);
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_lane_hears_its_answers_while_the_session_is_busy() {
    let Bed { wire, mut peer } = bed();
    let read = ask(&wire, Question::Read(4));
    let write = ask(&wire, Question::Write(b"word"));
    assert_eq!(wire.answer(read, 4), Ok(None));
    let (first, second) = (hear(&mut peer), hear(&mut peer));
    let about = |message: &Message| {
        let (access, data) = DmaAccess::read_from_prefix(&message.body).unwrap();
        (message.header.command, access.address, access.count, data.to_vec())
    };
    assert_eq!(about(&first), (command::DMA_READ, 0x1000, 4, vec![]));
    assert_eq!(about(&second), (command::DMA_WRITE, 0x1000, 4, b"word".to_vec()));
    // Answers may come in any order, and commands between them stay for the session.
    answer(&peer, &second, b"");
    peer.send(Header { id: 9, command: 5, ..Header::default() }, &[b"a command"], &[]).unwrap();
    answer(&peer, &first, b"data");
    assert_eq!(settled(&wire, read, 4), Ok(b"data".to_vec()));
    assert_eq!(settled(&wire, write, 4), Ok(vec![]));
    let mut message = Message::default();
    wire.receive(&mut message).unwrap();
    assert_eq!((message.header.id, &message.body[..]), (9, &b"a command"[..]));
}

#[test]
fn the_session_hands_answers_to_who_asked() {
    let Bed { wire, mut peer } = bed();
    let session = {
        let wire = Arc::clone(&wire);
        std::thread::spawn(move || {
            let mut message = Message::default();
            wire.receive(&mut message).unwrap();
            message.header.id
        })
    };
    let id = ask(&wire, Question::Read(2));
    let asked = hear(&mut peer);
    answer(&peer, &asked, b"ok");
    assert_eq!(settled(&wire, id, 2), Ok(b"ok".to_vec()));
    peer.send(Header { id: 77, command: 5, ..Header::default() }, &[], &[]).unwrap();
    assert_eq!(session.join().unwrap(), 77);
}

#[test]
fn answers_that_are_none_are_faults_or_the_sessions() {
    let Bed { wire, mut peer } = bed();
    for (flags, body) in [(TYPE_REPLY | FLAG_ERROR, &[][..]), (TYPE_REPLY, &[0; 16][..]), (TYPE_REPLY, &[0; 3][..])] {
        let id = ask(&wire, Question::Read(4));
        let asked = hear(&mut peer);
        peer.send(Header { flags, ..asked.header }, &[body], &[]).unwrap();
        assert_eq!(settled(&wire, id, 4), Err(DmaFault));
    }
    // To another command, twice, or to what was forgotten.
    let id = ask(&wire, Question::Read(4));
    let asked = hear(&mut peer);
    wire.forget(id);
    answer(&peer, &asked, b"late");
    peer.send(Header { flags: TYPE_REPLY, command: 2, ..asked.header }, &[], &[]).unwrap();
    let mut message = Message::default();
    for _ in 0..2 {
        wire.receive(&mut message).unwrap();
        assert_eq!(message.header.flags, TYPE_REPLY);
    }
}

#[test]
fn a_peer_that_does_not_read_keeps_nobody() {
    let Bed { wire, peer } = bed();
    let data = vec![1; 1 << 20];
    let mut asked = Vec::new();
    // Until the socket is full: then questions are put off, and those asked are not answered.
    while let Some(id) = wire.ask(Iova(0), Question::Write(&data)).unwrap() {
        asked.push(id);
        assert!(asked.len() < 100, "the socket never fills up");
    }
    assert_eq!(wire.answer(asked[0], 1), Ok(None));
    drop(peer);
    assert_eq!(wire.answer(asked[0], 1), Err(DmaFault));
    assert!(wire.ask(Iova(0), Question::Read(1)).is_err());
}

/// What lanes meet while the session is busy has an end.
#[test]
fn a_flood_of_commands_stays_in_the_socket() {
    let Bed { wire, peer } = bed();
    let id = ask(&wire, Question::Read(1));
    for number in 0..KEPT_MAX as u16 + 10 {
        peer.send(Header { id: number, command: 5, ..Header::default() }, &[], &[]).unwrap();
    }
    assert_eq!(wire.answer(id, 1), Ok(None));
    assert_eq!(lock(&wire.inbound).kept.len(), KEPT_MAX);
    let mut message = Message::default();
    for number in 0..KEPT_MAX as u16 + 10 {
        wire.receive(&mut message).unwrap();
        assert_eq!(message.header.id, number, "in their order");
    }
}

#[test]
fn an_end_that_a_lane_meets_is_told_to_the_session_behind_what_came_before() {
    let Bed { wire, peer } = bed();
    let id = ask(&wire, Question::Read(1));
    peer.send(Header { id: 5, command: 5, ..Header::default() }, &[], &[]).unwrap();
    drop(peer);
    assert_eq!(settled(&wire, id, 1), Err(DmaFault));
    let mut message = Message::default();
    wire.receive(&mut message).unwrap();
    assert_eq!(message.header.id, 5);
    assert!(matches!(wire.receive(&mut message), Err(FramingError::Closed)));
}

/// Commands whose descriptors nobody has taken yet must not use up those of the whole process.
#[test]
fn few_descriptors_are_kept_for_the_session() {
    let Bed { wire, peer } = bed();
    let (reader, _writer) = std::io::pipe().unwrap();
    let fds = [std::os::fd::AsFd::as_fd(&reader); DESCRIPTORS_MAX];
    let id = ask(&wire, Question::Read(4));
    for id in 1..=5 {
        peer.send(Header { id, command: 5, ..Header::default() }, &[], &fds[..100]).unwrap();
    }
    assert_eq!(wire.answer(id, 4), Ok(None));
    // It stops behind the one with which 4 MiB are full, and 100 of them count as 3.1.
    let kept = lock(&wire.inbound).kept.iter().map(|message| message.fds.len()).sum::<usize>();
    assert_eq!(kept, 200);
    for id in 1..=5 {
        let mut message = Message::default();
        wire.receive(&mut message).unwrap();
        assert_eq!(message.header.id, id);
    }
    let inbound = lock(&wire.inbound);
    assert_eq!((inbound.kept_bytes, inbound.kept.len()), (0, 0));
}

#[test]
fn an_answer_goes_through_a_socket_whole_or_not_at_all() {
    let Bed { wire, .. } = bed();
    wire.set_transfer_bytes_max(1 << 20);
    let (mut vmm, _card) = UnixStream::pair().unwrap();
    vmm.set_nonblocking(true).unwrap();
    let answer = vec![0; HEADER_BYTES + size_of::<DmaAccess>() + wire.bytes_max() as usize];
    let refused = loop {
        match vmm.write(&answer) {
            Ok(taken) => assert_eq!(taken, answer.len()),
            Err(refused) => break refused,
        }
    };
    assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
}
