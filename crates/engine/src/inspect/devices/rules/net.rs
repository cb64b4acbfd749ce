//! Network adapters other than virtio, whose state has its own codec.

use crate::inspect::devices::rule::Expect::{AtMost, OneOf, SignedWithin};
use crate::inspect::devices::rule::ValueRule;

/// The rules on emulated network adapters.
pub const RULES: &[ValueRule] = &[
    // A shift of the number of free descriptors: four settings.
    ValueRule::index("e1000", "rxbuf_min_shift", AtMost(4)),
    ValueRule::index("e1000e", "core.rxbuf_min_shift", AtMost(8)),
    // The descriptor's length, read into one of the largest kind; zero until reception is set up.
    ValueRule::index("e1000e", "core.rx_desc_len", OneOf(&[0, 16, 32])),
    ValueRule::index("igb", "core.rx_desc_len", OneOf(&[0, 16])),
    // A packet is split over up to four buffers of up to 63 KiB.
    ValueRule::index("e1000e", "core.rxbuf_sizes", AtMost(63 * 1024)),
    ValueRule::index("e1000e", "core.rx_desc_buf_size", AtMost(4 * 63 * 1024)),
    // One of four transmit descriptors.
    ValueRule::index("rtl8139", "currTxDesc", AtMost(3)),
    // One of 128 registers; a place in the buffer of 4096 bytes, -1 says none.
    ValueRule::index("pcnet", "rap", SignedWithin(0, 127)),
    ValueRule::index("pcnet", "xmit_pos", SignedWithin(-1, 4096)),
    // Eight queues each way, 25 interrupts, a list as long as 16 bits can say.
    ValueRule::index("vmxnet3", "txq_num", AtMost(8)),
    ValueRule::index("vmxnet3", "rxq_num", AtMost(8)),
    ValueRule::index("vmxnet3", "event_int_idx", AtMost(24)),
    ValueRule::index("vmxnet3-txq-descr", "intr_idx", AtMost(24)),
    ValueRule::index("vmxnet3-rxq-descr", "intr_idx", AtMost(24)),
    ValueRule::shape("vmxnet3", "mcast_list_buff_size", AtMost(0xffff)),
];
