//! Which of several packet sockets takes a frame: each has a filter of its own, and all filters agree.
//!
//! A filter is a program of classic BPF, which the kernel runs on each frame. It adds up what tells a flow from others: the addresses of
//! an IP packet, and the ports of TCP and UDP. So the frames of one flow come to one socket, in order. What is no IP packet comes to
//! the first one.
//!
//! A load outside of the frame would end the program, and the frame would be nobody's: so lengths are looked at before.

use libc::{
    BPF_ABS, BPF_ALU, BPF_B, BPF_H, BPF_IND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_LDX,
    BPF_LEN, BPF_MEM, BPF_MISC, BPF_MOD, BPF_MSH, BPF_MUL, BPF_RET, BPF_RSH, BPF_ST, BPF_SUB, BPF_TAX, BPF_W, BPF_X,
    BPF_XOR, sock_filter,
};

/// What a socket gets of the frames that come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Share {
    /// None.
    Nothing,
    /// Those of one in `count`; all for one of one.
    Of {
        /// Which of them: below `count`.
        number: u32,
        /// How many there are: not 0.
        count: u32,
    },
}

/// The filter of a share.
pub(super) fn filter(share: Share) -> Vec<sock_filter> {
    match share {
        Share::Nothing => vec![NOTHING],
        Share::Of { count: 1, .. } => vec![ALL],
        Share::Of { number, count } => assemble(&spread(number, count)),
    }
}

const fn step(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// Lets the whole frame through.
const ALL: sock_filter = step(BPF_RET | BPF_K, u32::MAX);
const NOTHING: sock_filter = step(BPF_RET | BPF_K, 0);

/// A place in the program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mark {
    /// Behind the instruction at hand.
    Next,
    Ipv4,
    Ipv6,
    /// Where the ports behind an IPv4 header are.
    Ports4,
    /// The same for IPv6.
    Ports6,
    /// The ports are loaded.
    Ports,
    /// All is added up.
    Sum,
    /// It is this socket's.
    Mine,
    /// It belongs to no flow.
    Other,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// No instruction: the place is here.
    Here(Mark),
    Plain(sock_filter),
    /// A condition and what is compared with; where to go if it holds, and if not.
    If(u32, u32, Mark, Mark),
    Go(Mark),
}

/// The program of these steps; jumps go forward.
fn assemble(steps: &[Step]) -> Vec<sock_filter> {
    let is_mark = |step: &&Step| matches!(step, Step::Here(_));
    let mut program = Vec::with_capacity(steps.len());
    for (number, step) in steps.iter().enumerate() {
        let distance = |to: Mark| {
            let rest = &steps[number + 1..];
            let marked = |step: &Step| matches!(step, Step::Here(mark) if *mark == to);
            rest.iter().take(rest.iter().position(marked).unwrap_or(0)).filter(|step| !is_mark(step)).count() as u8
        };
        match *step {
            Step::Here(_) => {}
            Step::Plain(instruction) => program.push(instruction),
            Step::If(condition, k, yes, no) => {
                let code = (BPF_JMP | condition | BPF_K) as u16;
                program.push(sock_filter { code, jt: distance(yes), jf: distance(no), k });
            }
            Step::Go(to) => program.push(self::step(BPF_JMP | BPF_JA, distance(to).into())),
        }
    }
    program
}

const IPV4: u32 = libc::ETH_P_IP as u32;
const IPV6: u32 = libc::ETH_P_IPV6 as u32;
const TCP: u32 = libc::IPPROTO_TCP as u32;
const UDP: u32 = libc::IPPROTO_UDP as u32;
/// There are more fragments, or this is not the first one.
const FRAGMENT: u32 = 0x3fff;
/// An odd number with its bits well spread (the golden ratio's): multiplied by it each bit of a sum moves the upper ones.
const SPREAD: u32 = 0x9e37_79b1;

/// The steps of one in several. What is added up is in the accumulator, then in the first cell of memory.
fn spread(number: u32, count: u32) -> Vec<Step> {
    use Step::{Go, Here, If, Plain};
    let load = |size: u32, at: u32| Plain(step(BPF_LD | size | BPF_ABS, at));
    let length = Plain(step(BPF_LD | BPF_W | BPF_LEN, 0));
    let x_is_a = Plain(step(BPF_MISC | BPF_TAX, 0));
    let xor_x = Plain(step(BPF_ALU | BPF_XOR | BPF_X, 0));
    let keep = Plain(step(BPF_ST, 0));
    vec![
        load(BPF_H, 12),
        If(BPF_JEQ, IPV4, Mark::Ipv4, Mark::Next),
        If(BPF_JEQ, IPV6, Mark::Ipv6, Mark::Other),
        Here(Mark::Ipv4),
        length,
        If(BPF_JGE, 14 + 20, Mark::Next, Mark::Other),
        load(BPF_W, 14 + 12),
        x_is_a,
        load(BPF_W, 14 + 16),
        xor_x,
        keep,
        load(BPF_H, 14 + 6),
        If(BPF_JSET, FRAGMENT, Mark::Sum, Mark::Next),
        load(BPF_B, 14 + 9),
        If(BPF_JEQ, TCP, Mark::Ports4, Mark::Next),
        If(BPF_JEQ, UDP, Mark::Ports4, Mark::Sum),
        Here(Mark::Ports4),
        // The other register is the length of the header, with options.
        Plain(step(BPF_LDX | BPF_B | BPF_MSH, 14)),
        length,
        Plain(step(BPF_ALU | BPF_SUB | BPF_X, 0)),
        If(BPF_JGE, 14 + 4, Mark::Next, Mark::Sum),
        Plain(step(BPF_LD | BPF_W | BPF_IND, 14)),
        Go(Mark::Ports),
        Here(Mark::Ipv6),
        length,
        If(BPF_JGE, 14 + 40, Mark::Next, Mark::Other),
        // The lower halves of the addresses tell enough.
        load(BPF_W, 14 + 16),
        x_is_a,
        load(BPF_W, 14 + 20),
        xor_x,
        x_is_a,
        load(BPF_W, 14 + 32),
        xor_x,
        x_is_a,
        load(BPF_W, 14 + 36),
        xor_x,
        keep,
        load(BPF_B, 14 + 6),
        If(BPF_JEQ, TCP, Mark::Ports6, Mark::Next),
        If(BPF_JEQ, UDP, Mark::Ports6, Mark::Sum),
        Here(Mark::Ports6),
        length,
        If(BPF_JGE, 14 + 44, Mark::Next, Mark::Sum),
        load(BPF_W, 14 + 40),
        Here(Mark::Ports),
        Plain(step(BPF_LDX | BPF_W | BPF_MEM, 0)),
        xor_x,
        keep,
        Here(Mark::Sum),
        Plain(step(BPF_LD | BPF_W | BPF_MEM, 0)),
        Plain(step(BPF_ALU | BPF_MUL | BPF_K, SPREAD)),
        Plain(step(BPF_ALU | BPF_RSH | BPF_K, 16)),
        Plain(step(BPF_ALU | BPF_MOD | BPF_K, count)),
        If(BPF_JEQ, number, Mark::Mine, Mark::Next),
        Plain(NOTHING),
        Here(Mark::Mine),
        Plain(ALL),
        Here(Mark::Other),
        Plain(if number == 0 { ALL } else { NOTHING }),
    ]
}
