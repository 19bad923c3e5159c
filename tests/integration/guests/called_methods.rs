//! Calls each method of the handler `Called` (tests/helpers/called_methods.py) by the file that is
//! made of it, in a guest with nothing below it. Ends with eax = 0x600d, or the line of the check
//! that failed. `HOW` is 1, 2 or 3: the instruction.
#![no_std]
#![no_main]

mod called;

use called::called as handler;
use called::called::{Flags, Mode, Problem};
use called::{handshake, Caller, Error, Packet, Response, Status, Way};

const PASSED: u32 = 0x600d;
const ROOM: usize = 20_000;

static mut OURS: [u8; ROOM + 1] = [0; ROOM + 1];
static mut THEIRS: [u8; ROOM + 1] = [0; ROOM + 1];

macro_rules! check {
    ($condition:expr) => {
        if !$condition {
            return line!();
        }
    };
}

/// Asks again at once, and gives up after so many attempts; 0: never.
struct Restless(Way, u32);

impl Caller for Restless {
    unsafe fn send(&self, packet: &Packet) -> Response {
        self.0.send(packet)
    }

    fn values(&self) -> usize {
        self.0.values()
    }

    fn sleep(&self) {}

    fn attempts(&self) -> u32 {
        self.1
    }
}

fn numbers(way: &Restless) -> u32 {
    let sum = (1 << 63) + 0xffff_ffff + 0xffff + 0xff;
    check!(handler::unsigned(way, 0xff, 0xffff, 0xffff_ffff, 1 << 63) == Ok(sum));
    let sum = -(1 << 62) - (1 << 31) - 32768 - 128;
    check!(handler::signed(way, -128, -32768, i32::MIN, -(1 << 62)) == Ok(sum));
    let sum = (1 << 62) + i64::from(i32::MAX) + 32767 + 127;
    check!(handler::signed(way, 127, 32767, i32::MAX, 1 << 62) == Ok(sum));
    check!(handler::narrow(way, 5, 700) == Ok(-695));
    check!(handler::narrow(way, 5, -700) == Ok(705));
    check!(handler::three(way, 0xffff_ffff, 3, -1) == Ok(1));
    PASSED
}

fn members(way: &Restless) -> u32 {
    check!(handler::members(way, Mode::WRITE, Flags(0)) == Ok(Mode::WRITE));
    check!(handler::members(way, Mode::NEITHER, Flags(0)) == Ok(Mode::NEITHER));
    check!(handler::members(way, Mode::READ, Flags::A | Flags::TOP) == Ok(Mode::NEITHER));
    let wrong = Err(Error::Status(Status(0x1_fd00)));
    check!(handler::members(way, Mode(9), Flags(0)) == wrong);
    check!(handler::combine(way, Flags::A | Flags::TOP, false) == Ok(Flags::TOP));
    check!(handler::combine(way, Flags::B, true) == Ok(Flags::B | Flags::TOP));
    check!(handler::negate(way, true) == Ok(false));
    check!(handler::negate(way, false) == Ok(true));
    PASSED
}

fn buffers(way: &Restless, ours: &mut [u8], theirs: &mut [u8]) -> u32 {
    let wide = [0x77, 0x4e16, 0];
    check!(handler::texts(way, b"name\0", &wide, Some(b"\0")) == Ok(0x0204));
    check!(handler::texts(way, b"\0more\0", &wide[2..], None) == Ok(0xff_0000));
    check!(handler::texts(way, b"name", &wide, None) == Err(Error::NotTerminated));
    check!(handler::texts(way, b"name\0", &wide[..2], None) == Err(Error::NotTerminated));
    check!(handler::texts(way, b"name\0", &wide, Some(b"")) == Err(Error::NotTerminated));
    check!(handler::fill(way, 0xa5, &mut theirs[..ROOM]) == Ok(ROOM as u32));
    check!(theirs[..ROOM].iter().all(|byte| *byte == 0xa5) && theirs[ROOM] == 0);
    let mut sum = 5;
    for (at, byte) in ours[..ROOM].iter_mut().enumerate() {
        *byte = (7 * at + at / 256) as u8;
        sum += u64::from(*byte);
    }
    check!(handler::total(way, 5, &ours[..ROOM]) == Ok(sum));
    check!(handler::total(way, 5, &[]) == Ok(5));
    let given = handler::reverse(way, Some(&ours[..ROOM]), Some(&mut theirs[..ROOM]));
    check!(given == Ok(ROOM as u32));
    check!(theirs[..ROOM].iter().eq(ours[..ROOM].iter().rev()));
    check!(handler::reverse(way, None, Some(&mut theirs[..1])) == Ok(1));
    check!(handler::reverse(way, None, None) == Ok(3));
    check!(handler::TOTAL_DATA_LIMIT == ROOM);
    let wrong = Err(Error::Status(Status(0x2_fd00)));
    check!(handler::total(way, 5, ours) == wrong);
    PASSED
}

fn the_rest(way: &Restless) -> u32 {
    let failed = handler::fails(way, Problem::NOT_THERE.0 as u8);
    let native = if cfg!(target_arch = "x86_64") { 0xc000_0034 } else { 0 };
    check!(failed == Err(Error::Status(Status(native << 32 | 0x7_fe00))));
    let value = 1 << 40 | way.0 as u64;
    check!(handler::slow(way, value) == Ok(!value));
    let waiting = Status(u64::from(Status::WAITING) << 8);
    check!(handler::slow(&Restless(way.0, 1), 77) == Err(Error::Status(waiting)));
    check!(handler::nothing(way) == Ok(()));
    check!(handler::slow(way, 77) == Ok(!77));
    let answer = unsafe { handler::plain(way, [5, 6, 0, 0]) };
    check!(matches!(answer, Ok(answer) if answer.values[..2] == [!5, 11]));
    check!(handler::keywords(way, 1, 2, 3, 4) == Ok(10));
    check!(handler::ANSWER == 42);
    PASSED
}

#[no_mangle]
extern "C" fn guest() -> u32 {
    let way = match HOW {
        1 => Way::Cpuid,
        2 => Way::Vmcall,
        _ => Way::Vmmcall,
    };
    if handshake(&way).is_some() {
        return 0xbad; // the test answers no handshake
    }
    let way = Restless(way, 0);
    let passed = numbers(&way);
    let passed = if passed == PASSED { members(&way) } else { passed };
    // Nothing else has them.
    let (ours, theirs) = unsafe {
        let (ours, theirs) = (core::ptr::addr_of_mut!(OURS), core::ptr::addr_of_mut!(THEIRS));
        (&mut *ours, &mut *theirs)
    };
    let passed = if passed == PASSED { buffers(&way, ours, theirs) } else { passed };
    if passed == PASSED { the_rest(&way) } else { passed }
}

#[panic_handler]
fn panicked(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

core::arch::global_asm!(
    ".section .entry, \"ax\"",
    ".globl _start",
    "_start:",
    "    call guest",
    "    hlt",
    ".text"
);


/// What a compiler calls by itself: volatile, as it would make a call of such a loop.
mod memory {
    #[no_mangle]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
        let mut at = 0;
        while at < size {
            *to.add(at) = from.add(at).read_volatile();
            at += 1;
        }
        to
    }

    #[no_mangle]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, size: usize) -> *mut u8 {
        let mut at = 0;
        while at < size {
            to.add(at).write_volatile(byte as u8);
            at += 1;
        }
        to
    }

    #[no_mangle]
    unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, size: usize) -> i32 {
        let mut at = 0;
        while at < size {
            let (a, b) = (one.add(at).read_volatile(), other.add(at).read_volatile());
            if a != b {
                return i32::from(a) - i32::from(b);
            }
            at += 1;
        }
        0
    }
}
