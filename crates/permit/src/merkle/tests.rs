#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
use super::*;
use proptest::prelude::*;

fn leaves(count: u64) -> Vec<TreeHash> {
    (0..count).map(|n| leaf(&n.to_le_bytes())).collect()
}

/// MTH as RFC 9162 writes it down.
fn naive_root(leaves: &[TreeHash]) -> TreeHash {
    match leaves {
        [] => empty_root(),
        [one] => *one,
        _ => {
            let (left, right) = leaves.split_at(usize::try_from(split(leaves.len() as u64)).unwrap());
            parent(&naive_root(left), &naive_root(right))
        }
    }
}

/// A log as it is stored: with each entry the nodes that it completed.
fn stored(leaves: &[TreeHash]) -> (Frontier, Vec<Vec<TreeHash>>) {
    let mut frontier = Frontier::default();
    let nodes = leaves.iter().map(|l| frontier.push(*l)).collect();
    (frontier, nodes)
}

fn proof(stored: &[Vec<TreeHash>], parts: Vec<Vec<Node>>) -> Vec<TreeHash> {
    let find = |n: &Node| stored[usize::try_from(n.stored_at()).unwrap() - 1][n.level as usize];
    parts.iter().map(|nodes| joined(&nodes.iter().map(find).collect::<Vec<_>>()).unwrap()).collect()
}

#[test]
fn the_hashes_are_those_of_rfc_9162() {
    let hex_of = |hash: TreeHash| hash.to_string();
    assert_eq!(hex_of(empty_root()), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    assert_eq!(hex_of(leaf(b"")), "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d");
    // Known answers of Certificate Transparency's reference tree over these eight entries.
    let entries =
        ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];
    let mut frontier = Frontier::default();
    for entry in entries {
        frontier.push(leaf(&hex::decode(entry).unwrap()));
    }
    assert_eq!(hex_of(frontier.root()), "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328");
}

#[test]
fn every_proof_of_every_small_tree_holds_and_no_other_does() {
    let all = leaves(33);
    for size in 1..=33u64 {
        let tree = &all[..usize::try_from(size).unwrap()];
        let (frontier, nodes) = stored(tree);
        let root = naive_root(tree);
        assert_eq!(frontier.root(), root, "{size}");
        for index in 0..size {
            let path = proof(&nodes, inclusion_nodes(index, size).unwrap());
            let leaf = tree[usize::try_from(index).unwrap()];
            assert!(includes(leaf, index, size, &path, root), "{index} of {size}");
            for other in (0..size).filter(|other| *other != index) {
                assert!(!includes(leaf, other, size, &path, root), "{index} as {other} of {size}");
            }
        }
        for old in 0..=size {
            let old_root = naive_root(&all[..usize::try_from(old).unwrap()]);
            let path = proof(&nodes, consistency_nodes(old, size).unwrap());
            assert!(extends((old, old_root), (size, root), &path), "{old} in {size}");
        }
    }
}

proptest! {
    #[test]
    fn large_trees_prove_what_is_in_them(size in 1u64..3000, at in any::<prop::sample::Index>(), old in any::<prop::sample::Index>()) {
        let tree = leaves(size);
        let (frontier, nodes) = stored(&tree);
        let (index, old) = (at.index(tree.len()) as u64, old.index(tree.len()) as u64);
        let path = proof(&nodes, inclusion_nodes(index, size).unwrap());
        prop_assert!(includes(tree[at.index(tree.len())], index, size, &path, frontier.root()));
        let old_root = naive_root(&tree[..usize::try_from(old).unwrap()]);
        let path = proof(&nodes, consistency_nodes(old, size).unwrap());
        prop_assert!(extends((old, old_root), (size, frontier.root()), &path));
    }

    /// Whatever is changed in a proof, or in the log that it is about, it does not hold any more.
    #[test]
    fn a_changed_proof_does_not_hold(
        size in 2u64..400, at in any::<prop::sample::Index>(), old in any::<prop::sample::Index>(),
        change in 0u8..5, place in any::<prop::sample::Index>(), bit in 0usize..256,
    ) {
        let tree = leaves(size);
        let (frontier, nodes) = stored(&tree);
        let index = at.index(tree.len()) as u64;
        let old = 1 + old.index(tree.len() - 1) as u64;
        let old_root = naive_root(&tree[..usize::try_from(old).unwrap()]);
        // Each for its own claim: what is left of the proof that entry 0 is there can show that a log of 2 was extended.
        for (is_inclusion, mut path) in [
            (true, proof(&nodes, inclusion_nodes(index, size).unwrap())),
            (false, proof(&nodes, consistency_nodes(old, size).unwrap())),
        ] {
            let holds = |path: &[TreeHash], size, root| match is_inclusion {
                true => includes(tree[at.index(tree.len())], index, size, path, root),
                false => extends((old, old_root), (size, root), path),
            };
            prop_assert!(holds(&path, size, frontier.root()));
            let here = place.index(path.len());
            match change {
                0 => path[here].0[bit / 8] ^= 1 << (bit % 8),
                1 => drop(path.remove(here)),
                2 => path.push(empty_root()),
                3 => path.insert(here, path[here]),
                _ => {
                    let mut root = frontier.root();
                    root.0[bit / 8] ^= 1 << (bit % 8);
                    prop_assert!(!holds(&path, size, root));
                    continue;
                }
            }
            prop_assert!(!holds(&path, size, frontier.root()));
        }
    }

    /// A fork: the same length, another entry. Nothing shows it to extend what was seen.
    #[test]
    fn a_fork_extends_nothing_that_was_seen(size in 2u64..200, at in any::<prop::sample::Index>()) {
        let tree = leaves(size);
        let changed = at.index(tree.len());
        let mut fork = leaves(size + 1);
        fork[changed] = leaf(b"another");
        let (frontier, nodes) = stored(&fork);
        let old = changed as u64 + 1;
        let old_root = naive_root(&tree[..=changed]);
        let path = proof(&nodes, consistency_nodes(old, size + 1).unwrap());
        prop_assert!(!extends((old, old_root), (size + 1, frontier.root()), &path));
    }

    #[test]
    fn arbitrary_claims_never_panic(
        index in any::<u64>(), size in any::<u64>(), old in any::<u64>(),
        path in prop::collection::vec(any::<[u8; 32]>().prop_map(TreeHash), 0..70), bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        prop_assert!(!includes(leaf(b""), index, size, &path, empty_root()));
        prop_assert!(old == 0 || !extends((old, empty_root()), (size, leaf(b"")), &path));
        prop_assert!(Frontier::from_bytes(size, &bytes).is_none_or(|f| f.to_bytes() == bytes));
    }
}

#[test]
fn a_stored_frontier_has_exactly_the_roots_of_its_size() {
    let (frontier, _) = stored(&leaves(21));
    let bytes = frontier.to_bytes();
    assert_eq!(Frontier::from_bytes(21, &bytes), Some(frontier));
    assert_eq!(
        Frontier::from_bytes(22, &bytes),
        Some(Frontier { size: 22, roots: Frontier::from_bytes(21, &bytes).unwrap().roots })
    );
    assert_eq!(Frontier::from_bytes(20, &bytes), None);
    assert_eq!(Frontier::from_bytes(21, &bytes[1..]), None);
    assert_eq!(Frontier::from_bytes(0, &[]), Some(Frontier::default()));
}
