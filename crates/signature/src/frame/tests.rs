#![allow(clippy::unwrap_used)]
use super::*;

fn request(frame: &[u8]) -> Result<Request<'_>, FrameError> {
    let (header, payload) = frame.split_first_chunk().unwrap();
    Request::decode(Header::of_request(*header)?, payload)
}

fn answers(bytes: &[u8], piece: usize) -> Result<Vec<Answer>, FrameError> {
    let (mut reader, mut all) = (AnswerReader::default(), Vec::new());
    for piece in bytes.chunks(piece) {
        reader.feed(piece, |answer| all.push(answer))?;
    }
    Ok(all)
}

fn run(block: u16, offset: u64, length: u32) -> Run {
    Run { block, offset, length }
}

#[test]
fn requests_round_trip() {
    for wanted in [
        Request::Rules { name: "a.yar", source: b"rule a { condition: true }" },
        Request::Start,
        Request::Batch { id: 7, runs: vec![run(0, 4096, 3), run(2, 1 << 40, 2)], bytes: b"abcde" },
        Request::Batch { id: 0, runs: vec![], bytes: b"" },
        Request::Finish,
    ] {
        assert_eq!(request(&wanted.encode().unwrap()).unwrap(), wanted);
    }
}

#[test]
fn answers_round_trip_in_any_pieces() {
    let all = vec![
        Answer::Ready { rules: 50, sandbox: "no-new-privs seccomp".to_owned() },
        Answer::Refused { why: "error: line 1\n  unknown".to_owned() },
        Answer::Hit { rule: "EICAR".to_owned(), response: Response::Refuse, block: 1, offset: 1 << 33 },
        Answer::Hit { rule: "r".repeat(128), response: Response::Report, block: 0, offset: 0 },
        Answer::Scanned { id: u64::MAX, skipped_bytes: 5 },
        Answer::Done { scanned_bytes: 1, skipped_bytes: 2, hits_total: 3 },
    ];
    let bytes: Vec<u8> = all.iter().flat_map(|answer| answer.encode().unwrap()).collect();
    for piece in [1, 2, 5, 7, bytes.len()] {
        assert_eq!(answers(&bytes, piece).unwrap(), all, "pieces of {piece}");
    }
}

#[test]
fn what_is_too_large_is_not_encoded() {
    let long = "n".repeat(MAX_NAME_BYTES + 1);
    assert!(Request::Rules { name: &long, source: b"" }.encode().is_err());
    let large = vec![0; MAX_BATCH_BYTES + 1];
    let length = u32::try_from(large.len()).unwrap();
    assert!(Request::Batch { id: 0, runs: vec![run(0, 0, length)], bytes: &large }.encode().is_err());
    assert!(Request::Batch { id: 0, runs: vec![run(0, 0, 1)], bytes: b"ab" }.encode().is_err());
    assert!(Request::Batch { id: 0, runs: vec![run(0, 0, 0); MAX_RUNS + 1], bytes: b"" }.encode().is_err());
    let hit = Answer::Hit { rule: long, response: Response::Report, block: 0, offset: 0 };
    assert!(hit.encode().is_err());
    let text = Answer::Refused { why: "x\u{1b}[2J".repeat(MAX_TEXT_BYTES) }.encode().unwrap();
    assert!(matches!(&answers(&text, 9).unwrap()[..], [Answer::Refused { why }] if why.starts_with("x?[2J")));
}

#[test]
fn nonsense_is_refused() {
    for (bytes, why) in [
        (&[0, 0, 0, 0, 0][..], FrameError::UnknownType { kind: 0 }),
        (&[READY, 0, 0, 0, 0], FrameError::UnknownType { kind: READY }),
        (&[START, 0, 0, 0, 1, 0], FrameError::BadLength { kind: START, length: 1 }),
        (&[BATCH, 255, 0, 0, 0], FrameError::BadLength { kind: BATCH, length: 0xff00_0000 }),
        (&[BATCH, 0, 0, 0, 1, 0], FrameError::BadPayload { kind: BATCH }),
        (&[RULES, 0, 0, 0, 2, 0, 1], FrameError::BadPayload { kind: RULES }),
    ] {
        assert_eq!(request(bytes).unwrap_err(), why);
    }
    // A run at the end of the address space, and lengths that do not add up.
    let mut overflow = Request::Batch { id: 0, runs: vec![run(0, 0, 1)], bytes: b"a" }.encode().unwrap();
    overflow[HEADER_BYTES + 12..HEADER_BYTES + 20].fill(255);
    assert!(request(&overflow).is_err());
    let mut sum = Request::Batch { id: 0, runs: vec![run(0, 0, 1)], bytes: b"a" }.encode().unwrap();
    sum[HEADER_BYTES + 23] = 2;
    assert!(request(&sum).is_err());
    for bytes in [
        &[START, 0, 0, 0, 0][..],
        &[SCANNED, 0, 0, 0, 13],
        &[SCANNED, 0, 0, 0, 1, 0],
        &[HIT, 0, 0, 0, 12, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b'r'],
        &[HIT, 0, 0, 0, 12, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7],
        &[HIT, 0, 0, 0, 11, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert!(answers(bytes, 3).is_err(), "{bytes:?}");
    }
}

#[test]
fn any_bytes_end_in_an_answer_or_an_error() {
    // A small generator: the outcome only has to be one, without a panic.
    let mut state = 1u32;
    for _ in 0..2000 {
        let bytes: Vec<u8> = (0..64)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0] & 0x47
            })
            .collect();
        let _outcome = (answers(&bytes, 13), request(&bytes));
    }
}
