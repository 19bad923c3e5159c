//! Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
//!
//! A module of a crate, with `no_std` or without: `mod handlers;`. A handler is a module, a method a
//! function, whose first argument says how it is called: `Way::Cpuid`, or a `Caller` of your own,
//! which may sleep by the means of its system, or send a request in another way.
//!
//! CPUID does no harm where there is no host. VMCALL and VMMCALL may be undefined there. So begin
//! with `handshake(&Way::Cpuid)`.
#![allow(dead_code, unused_imports, unused_unsafe, unsafe_op_in_unsafe_fn, clippy::all)]
// Names are those that the handlers have.
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals)]

use core::arch::asm;

pub const MAGIC: u32 = 0x4249_4d56;
pub const STAMP3: u64 = 0x2133_5352_2d49_4d56;
pub const STAMP4: u64 = 0x2134_5352_2d49_4d56;
/// What this file is written for.
pub const VERSION_MAJOR: u32 = 1;

/// What a register of a value holds.
pub type Word = usize;

/// A request. Where the form has no register for a value, the host sees 0.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub magic: u32,
    pub request: u16,
    pub method: u16,
    pub values: [Word; 4],
}

/// value1 to value4 of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    pub values: [Word; 4],
}

/// Why there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The stamps are missing: there is no host, no handler for the request, a policy denies it, or
    /// the handler failed or took too long.
    NotAnswered,
    /// A text that was given does not end with a NUL.
    NotTerminated,
    /// The host says so.
    Status(Status),
}

/// An encoded status, without its stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u64);

impl Status {
    /// The last attempt, too, was told to wait.
    pub const WAITING: u8 = 0x01;
    /// A page is not present however often it is touched.
    pub const TOUCH: u8 = 0x02;
    /// The code is the number of the parameter, from 1.
    pub const INVALID_PARAMETERS: u8 = 0xfd;
    /// The code is the method's own.
    pub const FAILED: u8 = 0xfe;
    pub const ABORTED: u8 = 0xff;

    /// One of the above, or one that a newer host has.
    pub const fn kind(self) -> u8 {
        (self.0 >> 8) as u8
    }

    pub const fn code(self) -> u8 {
        (self.0 >> 16) as u8
    }

    /// An NTSTATUS, an HRESULT or an errno; 0 in 32-bit code.
    pub const fn native(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// How requests reach the host.
pub trait Caller {
    /// Send one request, and return what is in the registers then.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    unsafe fn send(&self, packet: &Packet) -> Response;

    /// How many values a request has in 32-bit code: 4, and 2 of a hypercall.
    fn values(&self) -> usize {
        4
    }

    /// What to do before a request is sent again, which the host was not ready for.
    fn sleep(&self) {
        for _ in 0..200_000 {
            core::hint::spin_loop();
        }
    }

    /// How often a request is sent at the most while the host tells to wait; 0: without end.
    fn attempts(&self) -> u32 {
        0
    }
}

/// The instruction that a request is sent by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Cpuid,
    Vmcall,
    Vmmcall,
}

impl Caller for Way {
    #[inline]
    unsafe fn send(&self, packet: &Packet) -> Response {
        unsafe { trap(*self, packet) }
    }

    #[inline]
    fn values(&self) -> usize {
        if *self == Way::Cpuid {
            4
        } else {
            2
        }
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn trap(way: Way, packet: &Packet) -> Response {
    let code = u64::from(packet.request) | u64::from(packet.method) << 16;
    let magic = u64::from(packet.magic);
    let (mut a, b): (u64, u64);
    let (mut c, mut d) = match way {
        Way::Cpuid => (code, 0),
        _ => (magic, code),
    };
    a = if way == Way::Cpuid { magic } else { 0x22 };
    // rbx is the compiler's own. A hypercall has the signature of Xen's guest request, too.
    macro_rules! by {
        ($instruction:literal) => {
            asm!(
                "mov {b}, rbx", $instruction, "xchg {b}, rbx",
                b = out(reg) b, inout("rax") a, inout("rcx") c, inout("rdx") d,
                in("rdi") 0x18_u64, in("rsi") 0_u64,
                in("r8") packet.values[0], in("r9") packet.values[1],
                in("r10") packet.values[2], in("r11") packet.values[3],
            )
        };
    }
    unsafe {
        match way {
            Way::Cpuid => by!("cpuid"),
            Way::Vmcall => by!(".byte 0x0f, 0x01, 0xc1"),
            Way::Vmmcall => by!(".byte 0x0f, 0x01, 0xd9"),
        }
    }
    Response {
        values: [a as Word, b as Word, c as Word, d as Word],
    }
}

#[cfg(target_arch = "x86")]
unsafe fn trap(way: Way, packet: &Packet) -> Response {
    let code = u32::from(packet.request) | u32::from(packet.method) << 16;
    let [value1, value2, value3, value4] = packet.values.map(|value| value as u32);
    // eax, ebx, ecx, edx, esi, edi, ebp: all are in use, and some are the compiler's own.
    let mut registers: [u32; 7] = match way {
        Way::Cpuid => [packet.magic, value1, code, value2, value3, value4, 0],
        _ => [0x22, 0x18, 0, code, value1, value2, packet.magic],
    };
    macro_rules! by {
        ($instruction:literal) => {
            asm!(
                "push ebx", "push ebp", "push esi", "push edi", "push eax",
                "mov ebx, [eax + 4]", "mov ecx, [eax + 8]", "mov edx, [eax + 12]",
                "mov esi, [eax + 16]", "mov edi, [eax + 20]", "mov ebp, [eax + 24]",
                "mov eax, [eax]", $instruction, "pop ebp",
                "mov [ebp], eax", "mov [ebp + 4], ebx", "mov [ebp + 8], ecx",
                "mov [ebp + 12], edx", "pop edi", "pop esi", "pop ebp", "pop ebx",
                inout("eax") registers.as_mut_ptr() => _, out("ecx") _, out("edx") _,
            )
        };
    }
    unsafe {
        match way {
            Way::Cpuid => by!("cpuid"),
            Way::Vmcall => by!(".byte 0x0f, 0x01, 0xc1"),
            Way::Vmmcall => by!(".byte 0x0f, 0x01, 0xd9"),
        }
    }
    let [a, b, c, d, ..] = registers.map(|register| register as Word);
    Response { values: [a, b, c, d] }
}

/// The version of the host and its features, if there is one of our major version.
pub fn handshake<C: Caller + ?Sized>(caller: &C) -> Option<(u32, u32)> {
    let packet = Packet { magic: MAGIC, request: 0, method: 1, values: [0; 4] };
    // It names no memory.
    let [version, features, third, fourth] = unsafe { caller.send(&packet) }.values;
    let stamped = third == STAMP3 as Word && fourth == STAMP4 as Word;
    (stamped && version as u32 >> 16 == VERSION_MAJOR).then(|| (version as u32, features as u32))
}

/// A word that names memory.
#[derive(Clone, Copy)]
enum Named {
    /// A number, or no memory.
    Nothing,
    /// Memory to read, of so many bytes.
    Read(usize),
    /// Memory to fill, of so many bytes.
    Fill(usize),
}

/// What a method is called by.
struct Method {
    magic: u32,
    request: u16,
    method: u16,
    stamps: [Option<u64>; 4],
    /// How many words; where a word is wider than 32 bits, 32-bit code has them in memory.
    words: usize,
    is_wide: bool,
}

/// The result, then the words: for a 32-bit form, memory of the host's.
type Block = [u64; 5];

fn stamped(stamps: &[Option<u64>; 4], response: &Response) -> bool {
    let mut pairs = stamps.iter().zip(&response.values);
    pairs.all(|(stamp, value)| stamp.map_or(true, |stamp| stamp as Word == *value))
}

/// Touch every page of memory, and return how many that are.
///
/// # Safety
///
/// The memory is there: to be read, or to be written.
unsafe fn touch(address: usize, size: usize, for_writing: bool) -> u32 {
    let mut pages = 0;
    let mut at = address;
    while at < address + size {
        let byte = at as *mut u8;
        unsafe {
            if for_writing {
                // A write that changes nothing, also when others write there.
                asm!("lock or byte ptr [{}], 0", in(reg) byte);
            } else {
                byte.read_volatile();
            }
        }
        pages += 1;
        at = (at | 4095) + 1;
    }
    pages
}

/// Send a request until it is answered: again while the host tells to wait, and again, a bounded
/// number of times, when it finds a page that is not present.
///
/// # Safety
///
/// What the words name is memory as `named` says.
unsafe fn call<C: Caller + ?Sized>(
    caller: &C,
    method: &Method,
    words: [u64; 4],
    named: [Named; 4],
) -> Result<u64, Error> {
    let mut block: Block = [0, words[0], words[1], words[2], words[3]];
    let at = block.as_mut_ptr();
    let in_block = cfg!(target_arch = "x86") && (method.is_wide || method.words > caller.values());
    let values = if in_block { [at as Word, 0, 0, 0] } else { words.map(|word| word as Word) };
    let Method { magic, request, method: code, .. } = *method;
    let packet = Packet { magic, request, method: code, values };
    let (mut attempts, mut touches) = (0_u32, 0_u32);
    loop {
        let response = unsafe { caller.send(&packet) };
        if !stamped(&method.stamps, &response) {
            return Err(Error::NotAnswered);
        }
        let status = Status(response.values[0] as u64 & !0xff00_00ff);
        match status.kind() {
            _ if status.0 == 0 && in_block => return Ok(unsafe { at.read_volatile() }),
            _ if status.0 == 0 => return Ok(response.values[1] as u64),
            Status::WAITING => {
                attempts = attempts.wrapping_add(1);
                if attempts == caller.attempts() {
                    return Err(Error::Status(Status(u64::from(Status::WAITING) << 8)));
                }
                caller.sleep();
            }
            Status::TOUCH => {
                // Once is enough, but where the system takes pages away in the meantime.
                let mut pages = unsafe { touch(at as usize, 40, true) };
                for (word, named) in words.iter().zip(named) {
                    pages += match named {
                        Named::Read(size) => unsafe { touch(*word as usize, size, false) },
                        Named::Fill(size) => unsafe { touch(*word as usize, size, true) },
                        Named::Nothing => 0,
                    };
                }
                if touches >= pages + 8 {
                    return Err(Error::Status(status));
                }
                touches += 1;
            }
            _ => return Err(Error::Status(status)),
        }
    }
}

/// Send four values as they are, again while value1 of the answer is what tells to wait.
///
/// # Safety
///
/// The host may read and write memory that the values name.
unsafe fn call_plain<C: Caller + ?Sized>(
    caller: &C,
    method: &Method,
    values: [Word; 4],
    wait: Option<u32>,
) -> Result<Response, Error> {
    let Method { magic, request, method: code, .. } = *method;
    let packet = Packet { magic, request, method: code, values };
    let mut attempts = 0_u32;
    loop {
        let response = unsafe { caller.send(&packet) };
        if !stamped(&method.stamps, &response) {
            return Err(Error::NotAnswered);
        }
        if wait != Some(response.values[0] as u32) {
            return Ok(response);
        }
        attempts = attempts.wrapping_add(1);
        if attempts == caller.attempts() {
            return Err(Error::Status(Status(u64::from(Status::WAITING) << 8)));
        }
        caller.sleep();
    }
}

/// How many bytes a text has, with its NUL.
fn text_size<T: Copy + Into<u32>>(text: &[T]) -> Result<usize, Error> {
    let end = text.iter().position(|unit| (*unit).into() == 0);
    end.map(|end| (end + 1) * core::mem::size_of::<T>()).ok_or(Error::NotTerminated)
}
