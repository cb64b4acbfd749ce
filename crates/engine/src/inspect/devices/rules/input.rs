//! Keyboard and mouse queues that are not on USB.

use crate::inspect::devices::rule::Expect::{AtMost, Pinned, SignedWithin};
use crate::inspect::devices::rule::ValueRule;

/// The rules on PS/2 and on the VMware mouse.
pub const RULES: &[ValueRule] = &[
    // Places in the 256 bytes of the queue, and how many are used (CVE-2017-16845).
    ValueRule::index("PS2 Common State", "queue.rptr", SignedWithin(0, 255)),
    ValueRule::index("PS2 Common State", "queue.wptr", SignedWithin(0, 255)),
    ValueRule::index("PS2 Common State", "queue.count", SignedWithin(0, 256)),
    // Where replies to commands end in that queue; -1 says there are none.
    ValueRule::index("ps2kbd/command_reply_queue", "parent_obj.queue.cwptr", SignedWithin(-1, 255)),
    // A command is a byte; -1 says none is open.
    ValueRule::index("PS2 Common State", "write_cmd", SignedWithin(-1, 255)),
    // Sets 1 to 3 exist; the number is also sent through a table of 256.
    ValueRule::index("ps2kbd", "scancode_set", SignedWithin(0, 3)),
    // The queue has 1024 words.
    ValueRule::shape("vmmouse", "queue_size", Pinned),
    ValueRule::index("vmmouse", "nb_queue", AtMost(1024)),
];
