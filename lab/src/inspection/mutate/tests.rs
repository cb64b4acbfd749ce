//! The mutator on a stream that is made by hand.

#![allow(clippy::unwrap_used)]

use super::super::gate;
use super::super::marks::Area;
use super::super::shape::Chipset;
use super::*;
use crate::qemu::Version;

/// One block of three pages, two devices, the second with a structure and a subsection; no return path.
fn handmade() -> Vec<u8> {
    let mut s = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0".to_vec();
    let end_of_part = |s: &mut Vec<u8>| {
        s.extend(16u64.to_be_bytes());
        s.extend([0x7e, 0, 0, 0, 1]);
    };
    s.extend(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
    s.extend(((3 * 4096u64) | 4).to_be_bytes());
    s.extend(b"\x06pc.ram");
    s.extend((3 * 4096u64).to_be_bytes());
    end_of_part(&mut s);
    s.extend([2, 0, 0, 0, 1]);
    s.extend(8u64.to_be_bytes());
    s.extend(b"\x06pc.ram");
    s.extend(std::iter::repeat_n(0xa5, 4096));
    s.extend((0x1000u64 | 0x22).to_be_bytes());
    s.push(0);
    end_of_part(&mut s);
    s.extend([3, 0, 0, 0, 1]);
    s.extend((0x2000u64 | 0x22).to_be_bytes());
    s.push(0);
    end_of_part(&mut s);
    s.extend(b"\x04\0\0\0\x02\x03one\0\0\0\0\0\0\0\x01\x11\x22\x7e\0\0\0\x02");
    s.extend(
        b"\x04\0\0\0\x03\x03two\0\0\0\0\0\0\0\x01\x33\x44\x55\x05\x05two/x\0\0\0\x01\x66\x7e\0\0\0\x03\0",
    );
    let description = concat!(
        r#"{"page_size":4096,"devices":[{"name":"one","instance_id":0,"vmsd_name":"one","version":1,"#,
        r#""fields":[{"name":"count","type":"uint8","size":2}]},"#,
        r#"{"name":"two","instance_id":0,"vmsd_name":"two","version":1,"#,
        r#""fields":[{"name":"parts","type":"struct","size":1,"array_len":2,"#,
        r#""struct":{"fields":[{"name":"x","type":"uint8","size":1}]}},{"name":"y","type":"uint8","size":1}],"#,
        r#""subsections":[{"vmsd_name":"two/x","version":1,"#,
        r#""fields":[{"name":"z","type":"uint8","size":1}]}]}]}"#
    );
    s.push(6);
    s.extend(u32::try_from(description.len()).unwrap().to_be_bytes());
    s.extend(description.as_bytes());
    s
}

fn base() -> Base {
    let shape = Shape::small(Version::V10, Chipset::Q35, &[]);
    let mut enrolled = Enrolled::learn(&handmade(), &handmade(), None).unwrap();
    // Nobody describes these devices: the outer grammar alone is at work.
    enrolled.unvouched = gate::Unvouched::Report;
    Base::new("handmade", &shape, &handmade(), &enrolled).unwrap()
}

#[test]
fn the_base_is_accepted_and_every_byte_of_device_state_has_a_name() {
    let base = base();
    let passed = gate::judge(&base.enrolled, &base.stream).unwrap().unwrap();
    assert_eq!(passed, base.stream);
    let names: Vec<_> = base.marks.fields(Area::Payload).iter().map(|field| field.name.as_str()).collect();
    let expect = [
        "one[0]: count",
        "two[0]: parts: x",
        "two[0]: parts: x",
        "two[0]: y",
        "two[0]/two/x type",
        "two[0]/two/x name length",
        "two[0]/two/x name",
        "two[0]/two/x version",
        "two[0]/two/x: z",
    ];
    assert_eq!(names, expect);
    let unnamed = (0..base.stream.len()).filter(|at| base.marks.name_of(*at).is_none()).count();
    assert_eq!(unnamed, 0, "bytes of the stream that are no field");
}

#[test]
fn a_mutation_is_the_same_every_time_and_changes_the_stream() {
    let base = base();
    let mutants = |seed| (0..500).map(|case| base.mutate(&mut Rng::of(seed, case))).collect::<Vec<_>>();
    let first = mutants(1);
    assert_eq!(first, mutants(1));
    assert_ne!(first, mutants(2));
    for mutant in &first {
        assert!(!mutant.changes.is_empty());
        assert!(mutant.changes.is_sorted_by_key(|change| change.offset), "{:?}", mutant.changes);
    }
    let unchanged = first.iter().filter(|mutant| mutant.stream == base.stream).count();
    assert!(unchanged < 10, "{unchanged} of 500 mutations changed nothing");
}

#[test]
fn some_mutations_are_legal_and_most_are_refused_by_many_rules() {
    let base = base();
    let (mut accepted, mut rules) = (0, std::collections::BTreeSet::new());
    for case in 0..2000 {
        let mutant = base.mutate(&mut Rng::of(1, case));
        match gate::judge(&base.enrolled, &mutant.stream).unwrap() {
            Ok(passed) => {
                accepted += 1;
                assert_eq!(passed, mutant.stream);
            }
            Err(violation) => {
                rules.insert(violation.rule);
            }
        }
    }
    assert!((200..1000).contains(&accepted), "{accepted} of 2000 accepted");
    assert!(rules.len() > 20, "{rules:?}");
}
